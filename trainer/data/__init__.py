"""From a folder of images to global batches: index, checks, decoding, augmentation, order."""
