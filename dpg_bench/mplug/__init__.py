"""mPLUG-large for visual question answering (arXiv 2205.12005), in plain PyTorch."""
