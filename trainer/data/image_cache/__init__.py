"""Image cache: decoded images on the disk or in memory, shared by runs and processes."""
