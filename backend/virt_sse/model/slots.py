"""Slots of DEKs that belong to a domain and to no disk in the store."""

from __future__ import annotations

TEMP_SLOT = "temp"
"""The slot of a VM's temporary disk: made at its start and gone at its end, and in no store."""

TPM_SLOT = "tpm"
"""The slot of what a VM's emulated TPM encrypts its state with; the id before it is the domain's."""
