"""A vault's folder: layout, settings, database, sealing."""
