"""The trainer of regraft: fine-tunes pretrained image classifiers. Read `main.py` first."""
