"""Janus-Pro as a text-to-image generator (arXiv 2501.17811)."""
