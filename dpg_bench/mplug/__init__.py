"""mPLUG-large for visual question answering (arXiv 2205.12005): the judge of DPG-Bench, in plain
PyTorch.
"""
