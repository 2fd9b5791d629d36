"""Open-MAGVIT2's class-conditional generator (arXiv 2409.04410)."""
