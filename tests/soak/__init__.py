"""Kills at seeded random moments, over every operation: ``python -m soak``, from the folder ``tests``."""
