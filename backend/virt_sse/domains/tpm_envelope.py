"""The wrapped DEK of an emulated TPM, in an envelope file beside the TPM's state.

Like the envelope in a disk's image, the file restores the wrapped DEK after a loss of the store. libvirt
removes the file along with the state when the domain is undefined.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from virt_sse.errors import EnvelopeError
from virt_sse.model.ciphers import AES_256_CBC
from virt_sse.model.envelope import DekEntry, Envelope
from virt_sse.model.keys import WrappedDek
from virt_sse.model.layers import EncryptionType
from virt_sse.model.slots import TPM_SLOT
from virt_sse.system.files import shared_folder, write_private

_FILE = "virt-sse.envelope"
_FOLDER_MODE = 0o711
"""The same mode as libvirt's: swtpm, which does not run as root, must traverse the folder."""


def read(folder: Path, vm_id: UUID) -> WrappedDek | None:
    """Read the wrapped DEK in *folder*; ``None`` without an envelope file.

    :raise EnvelopeError: When the file cannot be read, or belongs to a different VM.
    """
    try:
        content = (folder / _FILE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise EnvelopeError(f"cannot read {folder / _FILE}: {exc.strerror}") from exc
    envelope = Envelope.decode(content)
    if envelope.disk_id != vm_id or [entry.slot for entry in envelope.deks] != [TPM_SLOT]:
        raise EnvelopeError(f"{folder / _FILE} does not belong to the TPM of domain {vm_id}")
    return envelope.deks[0].wrapped


def write(folder: Path, vm_id: UUID, wrapped: WrappedDek) -> None:
    """Write *wrapped* to *folder*, durably. Does nothing if the file holds *wrapped* already.

    :raise EnvelopeError: When the file cannot be written.
    """
    try:
        if read(folder, vm_id) == wrapped:
            return
    except EnvelopeError:
        pass  # a damaged file is replaced
    envelope = Envelope(
        disk_id=vm_id,
        name="tpm",
        encryption_type=EncryptionType.PLATFORM_KEY,
        set_id=None,
        created=datetime.now(UTC).replace(microsecond=0),
        generation=1,
        deks=(DekEntry(TPM_SLOT, AES_256_CBC, wrapped),),
    )
    try:
        for each in (folder.parent, folder):
            shared_folder(each, _FOLDER_MODE)
        write_private(folder / _FILE, envelope.encode())
    except OSError as exc:
        raise EnvelopeError(f"cannot write {folder / _FILE}: {exc.strerror}") from exc
