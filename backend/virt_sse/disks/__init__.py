"""The life of a disk: created, imported, resized, exported, inspected, erased."""
