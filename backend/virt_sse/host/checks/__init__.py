"""The checks of ``virt-sse host doctor``: functions of a host and the disks of its store."""
