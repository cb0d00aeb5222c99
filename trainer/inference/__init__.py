"""Predict with a trained model: the Python API, and what `regraft predict` consists of."""
