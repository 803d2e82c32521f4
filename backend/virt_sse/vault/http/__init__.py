"""The vault's HTTP interface: Azure Key Vault's protocol and the management interface."""
