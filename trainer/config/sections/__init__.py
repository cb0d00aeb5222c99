"""The sections of a config, one module each. The docstrings of the fields are the texts of `--help`."""
