"""Configuration: schema, command line and YAML, resolved values, and the objects built from them."""
