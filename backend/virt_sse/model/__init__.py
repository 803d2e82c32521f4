"""Value objects without I/O: disks, keys, ciphers, layers, disk encryption sets, VMs, operations, events."""
