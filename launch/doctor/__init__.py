"""`regraft doctor`: check whether a machine, or several nodes, can run a training."""
