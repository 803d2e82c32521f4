"""Copies of disks into new encrypted disks: re-encryption, and encryption of plaintext disks in place."""
