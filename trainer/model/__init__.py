"""From a name and a weights file to a model with a new head."""
