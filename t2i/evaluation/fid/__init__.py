"""FID, sFID, Inception Score, precision and recall, as OpenAI's ADM evaluator computes them."""
