"""Built-in plugins of virt-sse, registered through entry points like any other plugin."""
