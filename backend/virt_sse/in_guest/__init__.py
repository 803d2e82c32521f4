"""Detection of in-guest encryption: parsing of hostile bytes from the plaintext of guests' disks."""
