"""One program per way to fine-tune. Each trains on an image folder and writes its epochs as JSON (`common.py`)."""
