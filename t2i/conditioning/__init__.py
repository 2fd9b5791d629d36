"""What an image is conditioned on: class labels, captions and their frozen flan-t5 features."""
