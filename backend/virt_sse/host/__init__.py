"""A host: its initial set-up and its capabilities."""
