"""Datasets in folders: find the splits, the classes and the images."""
