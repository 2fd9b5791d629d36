"""The shapes world's interface to training and benchmarks; see `t2i.worlds`."""

from t2i.shapes.shapes_detector import ShapesDetector as open_detector
from t2i.shapes.shapes_prompts import benchmark_prompts, every_prompt
from t2i.shapes.shapes_questions import ShapesJudge as open_judge
from t2i.shapes.shapes_questions import shapes_questions as questions
from t2i.shapes.shapes_source import parse_shapes as open_source

__all__ = [
    "benchmark_prompts",
    "every_prompt",
    "open_detector",
    "open_judge",
    "open_source",
    "questions",
]
