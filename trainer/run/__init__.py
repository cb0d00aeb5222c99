"""The run folder: what a run writes beside its checkpoints."""
