"""The output of a run for people: console, metrics file, figures and summaries."""
