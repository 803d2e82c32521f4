"""Access to libvirt: connections, domain definitions, secrets, pools and the hook script."""
