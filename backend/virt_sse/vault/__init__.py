"""The embedded key vault: an HTTPS service that speaks Azure Key Vault's protocol for keys.

What holds for it:

- A key is disabled, deleted or denied from the next request on. Nothing is cached beyond a change.
- **nbf and exp**, as Azure documents it ("Date-time controlled operations",
  https://learn.microsoft.com/azure/key-vault/keys/about-keys-details): outside the window ``wrapKey`` and
  ``encrypt`` are refused; ``unwrapKey`` and ``decrypt`` go on, so that a key can be tried before its time and
  data recovered after it. To take data away, disable the key or delete it, do not let it expire.
- **enabled** is stronger: a disabled version refuses all four.
- RSA of 2048, 3072 and 4096 bits, with RSA-OAEP and RSA-OAEP-256. Private keys never leave the vault in the
  clear, not even in a backup.
- A premium vault's RSA-HSM keys are in a PKCS#11 token and never out of it; the database says where. While
  the token cannot be used the answer is 503, which is no verdict on any key.
- Nobody may do anything that was not granted. An administrator manages identities and access; using keys is
  granted like to anybody else, and recorded.
- Every use of a key, allowed or refused, is in the audit log before its answer leaves.

The service's side: :mod:`.server`, which runs :mod:`.app` over :mod:`.key_service` and :mod:`.principals`.
The client's side, which needs neither: :mod:`.credential_file`, :mod:`.credential`, :mod:`.client`.
"""
