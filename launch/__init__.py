"""Start, watch and restart training; this package imports neither torch nor the trainer."""
