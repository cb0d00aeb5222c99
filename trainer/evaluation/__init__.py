"""Evaluate a trained model: predictions of a split, the metrics that follow from them, and their report."""
