"""The embedded key vault: an HTTPS service with Azure Key Vault's protocol for keys.

Guarantees:

- Disabling, deleting or denying a key takes effect with the next request. No cache outlives a change.
- **nbf and exp** follow Azure ("Date-time controlled operations",
  https://learn.microsoft.com/azure/key-vault/keys/about-keys-details): outside the window ``wrapKey`` and
  ``encrypt`` are refused, while ``unwrapKey`` and ``decrypt`` still work, for tests before and recovery
  after. To withdraw access to data, disable or delete the key; do not let the key expire.
- **enabled** is stronger: a disabled version refuses all four operations.
- RSA of 2048, 3072 and 4096 bits, with RSA-OAEP and RSA-OAEP-256. Private keys never leave the vault in the
  clear, not even in a backup.
- A premium vault's RSA-HSM keys live in an HSM token and are not extractable; the database stores their
  location. While the HSM token is unusable, the answer is 503, which says nothing about the state of any key.
- Every action needs a grant. An administrator manages identities and access; administrators need a grant to
  use keys like every principal, and their use is audited.
- The audit log has a record of every use of a key, allowed or refused, before the response is sent.

Imports run downwards: :mod:`.http` (:mod:`.http.server` runs :mod:`.http.app`), the modules of this folder
(:mod:`.vault` puts the parts together), :mod:`.hsm`, :mod:`.keys` and :mod:`.identity`, :mod:`.home`;
:mod:`.refusals`, :mod:`.properties` and :mod:`.rate_limit` import no other part.
The client's side is :mod:`virt_sse.vault_client`, which needs none of these.
"""
