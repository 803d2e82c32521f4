"""The audit log: every use of a key, in a hash chain of records."""
