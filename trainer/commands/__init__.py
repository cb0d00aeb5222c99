"""One module per command besides training."""
