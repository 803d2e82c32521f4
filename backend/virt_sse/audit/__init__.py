"""The audit log: every use of a key, chained record by record."""
