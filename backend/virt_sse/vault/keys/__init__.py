"""Keys of a vault: rules, versions, material, rotation, backups."""
