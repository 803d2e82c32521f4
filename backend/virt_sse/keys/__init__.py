"""Keys of disks: audited access to KEKs, rewrapping, disk encryption sets."""
