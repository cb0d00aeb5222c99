"""Checkpoints: folders that are whole or absent, without pickle, written beside the training."""
