"""Runs on one machine, started through torchrun."""
