"""Data sets: caption-image sources, the code cache, the offline shapes world."""
