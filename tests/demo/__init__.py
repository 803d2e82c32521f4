"""The demo, a play in acts: guests on a private libvirt host, and what can be found out about their disks.

What it says was found out by looking: it reads the raw images, asks QEMU for its block graph and libvirt for
its secrets, and fails if any of that is not as it should be.
"""
