"""Build a model with a new output layer from an architecture and pretrained weights."""
