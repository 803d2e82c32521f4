"""The client side of a vault: credentials, HTTPS, administration."""
