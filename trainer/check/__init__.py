"""`regraft check`: statistics of a dataset, its duplicates, and what is likely to go wrong in training."""
