"""Unwraps a DEK and wraps it anew with the current key, in a process of its own; JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from uuid import UUID

from virt_sse.config import Config
from virt_sse.model.keys import DekContext, KeyId, WrappedDek
from virt_sse.plugins import PluginHost


def main() -> None:
    """Serve the request on standard input."""
    request = json.load(sys.stdin)
    config = dataclasses.replace(
        Config.load(Path(request["root"])), provider_options={request["provider"]: request["options"]}
    )
    encryption_set = UUID(request["encryption-set"]) if request["encryption-set"] else None
    provider = PluginHost(config).key_provider(request["provider"], encryption_set)
    ciphertext, algorithm, key = request["wrapped"]
    disk_id, slot = request["context"]
    context = DekContext(UUID(disk_id), slot)
    dek = provider.unwrap(WrappedDek(bytes.fromhex(ciphertext), algorithm, KeyId(*key)), context=context)
    wrapped = provider.wrap(dek, provider.current_key(key[1]), context=context)
    json.dump([wrapped.ciphertext.hex(), wrapped.algorithm, dataclasses.astuple(wrapped.key)], sys.stdout)


if __name__ == "__main__":
    main()
