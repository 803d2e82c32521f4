"""A vault's principals and their access tokens."""
