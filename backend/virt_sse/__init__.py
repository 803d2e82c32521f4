"""Server-side encryption for the disks of libvirt guests.

Must stay light: the libvirt hook imports this package for every domain event of the host.
"""

__version__ = "0.1.0"
