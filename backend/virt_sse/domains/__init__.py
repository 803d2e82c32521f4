"""A libvirt domain and our disks in it: start, hot-plug, settings, encryption at host."""
