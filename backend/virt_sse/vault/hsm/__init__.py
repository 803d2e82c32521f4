"""RSA-HSM keys of a vault, in a PKCS#11 token."""
