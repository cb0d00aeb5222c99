"""Starts, watches and restarts training processes. Imports neither torch nor the trainer, so it starts at once."""
