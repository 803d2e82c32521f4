"""Principals of a vault, and the access tokens they are issued."""
