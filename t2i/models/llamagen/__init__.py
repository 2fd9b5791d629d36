"""LlamaGen (arXiv 2406.06525): class-conditional, and text-to-image with flan-t5 captions."""
