"""QEMU's images and tools."""
