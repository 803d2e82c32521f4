"""Verification of domains: compares requested encryption with evidence from QEMU, stages and images."""
