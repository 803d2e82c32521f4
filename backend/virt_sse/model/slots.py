"""DEK slots of a domain itself, without a disk in the store."""

from __future__ import annotations

TEMP_SLOT = "temp"
"""Slot of a VM's temporary disk, which exists while the domain runs and is not in the store."""

TPM_SLOT = "tpm"
"""Slot of the DEK for the state of a VM's emulated TPM; the context's id is the domain's UUID."""

STATE_SLOT = "state"
"""Slot of the DEKs of a domain's saved state; the context's id is the saved state's UUID."""
