"""Checkpoints: written atomically in a background thread, verified when they are read, without pickle."""
