"""The demo, a play in acts: guests on a private libvirt host, and an inspection of their disks.

All printed results are observed: the demo reads the raw images, queries QEMU's block graph and libvirt's
secrets, and fails on any unexpected result.
"""
