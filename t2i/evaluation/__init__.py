"""What GenEval, DPG-Bench and FID share."""
