"""Helpers that several test modules share; tests import them as ``from support.images import KeyedImage``."""
