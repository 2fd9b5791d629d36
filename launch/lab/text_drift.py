"""How much does fine-tuning for drawing change Janus as a reader of text? LoRA adapts the language
model, so its text logits change, too. This program measures the change on fixed texts, adapters on
against adapters off.

    python launch/train_janus.py shapes-janus-lora --run-dir runs/janus
    python launch/lab/text_drift.py --ckpt runs/janus

For each text it prints KL(before || after) in nats and, for comparison, the entropy of the
predictions before (both are means over positions), the share of positions where the likeliest word
changed, and the largest change of a logit. A KL far below the entropy and few changed words mean
that the model reads text as before; benchmarks of understanding tell more.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.errors import UserError
from t2i.evaluation.results import markdown_table
from t2i.files import write_json

if TYPE_CHECKING:
    from t2i.models.base import Backbone
    from t2i.reward.reward_watch import Drift

TEXTS = (
    "What is shown in this picture? A red circle stands left of a blue square.",
    "How many objects are there? There are three green stars and two yellow hearts.",
    "Describe the position of the cat relative to the table in one sentence.",
    "The quick brown fox jumps over the lazy dog while the sun sets behind the hills.",
    "Explain step by step how to convert degrees Fahrenheit to degrees Celsius.",
)


@dataclass(frozen=True)
class TextDrift:
    """What to compare."""

    ckpt: Path
    """A run of Janus with LoRA, or a checkpoint folder of such a run."""
    texts: Path | None = None
    """File with one text per line, instead of the built-in ones."""
    out: Path | None = None
    """JSON file to write the numbers to; none if not given."""
    device: str = "auto"
    """auto, cpu or cuda."""


def drift_of(backbone: "Backbone", text: str) -> "Drift":
    """How much the backbone's adapters change its predictions on a text."""
    import torch

    from t2i.lora import without_lora
    from t2i.models.janus.janus_model import Janus
    from t2i.reward.reward_watch import drift

    assert isinstance(backbone, Janus)
    # Encoded like a question to Janus: without the final begin-of-image token.
    ids = torch.tensor([backbone.prompts.encode([text])[0][:-1]], device=backbone.device)
    with torch.no_grad():
        after = backbone.text_logits(ids)[0]
        with without_lora(backbone):
            before = backbone.text_logits(ids)[0]
    return drift(before, after)


def main() -> None:
    config = cli.parse(TextDrift, __doc__)
    from t2i.checkpoint import from_pretrained

    model = from_pretrained(config.ckpt, device=config.device, dtype="float32")
    backbone = model.backbone
    if backbone.spec.family != "janus" or backbone.lora is None:
        raise UserError(f"{config.ckpt} is no run of Janus with LoRA: give such a run to --ckpt")
    own = config.texts
    texts = TEXTS if own is None else own.read_text(encoding="utf-8").splitlines()
    found = {text: drift_of(backbone, text) for text in texts if text.strip()}
    head = ("text", "words", "KL", "entropy before", "other likeliest word", "largest change")
    rows = [
        (text, x.words, f"{x.kl:.4f}", f"{x.entropy:.3f}", f"{x.changed:.1%}", f"{x.largest:.3f}")
        for text, x in found.items()
    ]
    print(markdown_table(head, rows))
    if config.out is not None:
        write_json(config.out, {text: asdict(x) for text, x in found.items()})


if __name__ == "__main__":
    cli.run(main)
