"""Optimization: parameter groups, learning-rate schedule, loss, mixup and weight averaging."""
