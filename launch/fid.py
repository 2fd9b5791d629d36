"""FID, sFID, Inception Score, precision and recall of generated images, computed as by ADM's
evaluator.

python launch/fid.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
# compare two folders of images
python launch/fid.py --samples outputs/mine --reference my_images --allow-fewer
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli, launcher
from t2i.sampling import check_counts


@dataclass(frozen=True)
class FidConfig:
    """What to compare."""

    samples: Path
    """An .npz with arr_0, or any folder of images (of a generation folder, the samples)."""
    reference: Path
    """ADM's reference .npz, any other .npz with images or statistics, or a folder of images."""
    out: Path = Path("outputs/fid/results.json")
    """File for the scores and all that they depend on."""
    inception_weights: str | None = None
    """pt_inception-2015-12-05-6726825d.pth; downloaded if not given. "random" is for trials."""
    allow_fewer: bool = False
    """Allow fewer than 50,000 samples; the result says so."""
    batch_size: int = 64
    """Images per batch."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self):
        check_counts(batch_size=self.batch_size)


def main() -> None:
    config = cli.parse(FidConfig, __doc__)
    launcher.refuse_several()
    from t2i.evaluation.fid.fid_score import check_inputs, refuse_other_scores, score_images, table
    from t2i.evaluation.fid.inception import load_inception
    from t2i.files import writable_file, writable_folder, write_json
    from t2i.loading import pick_device

    # Everything that can be checked quickly, before a download and an hour of work.
    device, _ = pick_device(config.device, "float32")
    check_inputs(config.samples, config.reference, allow_fewer=config.allow_fewer)
    writable_file(config.out, make=False)
    refuse_other_scores(config.out, config.samples, config.reference)
    network, weights_hash = load_inception(config.inception_weights, device)
    writable_folder(config.out.parent)
    results = score_images(
        config.samples,
        config.reference,
        network,
        weights_hash,
        batch_size=config.batch_size,
        allow_fewer=config.allow_fewer,
    )
    write_json(config.out, results)
    print(f"{table(results)}\n\nwrote {config.out}")


if __name__ == "__main__":
    cli.run(main)
