"""Libvirt: its secrets, its domains and its hook."""
