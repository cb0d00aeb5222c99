"""Datasets that a CSV file lists: read and write it."""
