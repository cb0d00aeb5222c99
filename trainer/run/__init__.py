"""The run folder: layout, lock, atomic writes and records of a run."""
