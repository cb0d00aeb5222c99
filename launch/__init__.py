"""The launcher of regraft: starts, watches and restarts training. It imports neither torch nor the trainer."""
