"""Transfer-learning methods: linear probe, L2-SP, gradual unfreezing and WiSE-FT."""
