"""Benchmarks of regraft: `python -m benchmarks` compares its training speed with other ways to fine-tune."""
