"""Export a model file to other formats; each export is compared with the original before it appears."""
