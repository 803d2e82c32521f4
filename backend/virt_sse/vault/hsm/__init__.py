"""RSA-HSM keys of a vault: their PKCS#11 token."""
