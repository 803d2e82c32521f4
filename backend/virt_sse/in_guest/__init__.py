"""Encryption that a guest does by itself, found from outside, on its disks as it sees them."""
