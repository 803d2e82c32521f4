"""The plugins that come with virt-sse, registered like anyone's through entry points."""
