"""What `regraft doctor` looks at. Functions that judge take facts; what finds facts out stands beside them."""
