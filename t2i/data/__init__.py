"""Data sets: sources of images, the store of their codes, the order of samples."""
