"""Values without I/O: what a disk, a key, a layer, a disk encryption set, a VM is."""
