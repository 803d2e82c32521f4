"""This machine: files, locks, SQLite, subprocesses, memory."""
