"""RAR, class-conditional (arXiv 2411.00776)."""
