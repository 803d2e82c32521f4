"""QEMU's images, tools and monitors."""
