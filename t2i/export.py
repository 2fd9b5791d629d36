"""From a checkpoint to a folder that stands alone: adapters merged, the base in its authors' layout, TensorAR beside it, a model card.

OUT/                 the base with everything that training changed; for Janus-Pro what transformers' `from_pretrained` loads
OUT/tensorar/        a checkpoint folder with the codec; its base is the folder above, wherever that is moved
OUT/samples/         images drawn with both, and grid.png
OUT/README.md        the model card: recipe, scores, samples, how to load it
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from t2i.checkpoint import (
    EXPORTED,
    find_checkpoint,
    from_pretrained,
    read_config,
    save_pretrained,
)
from t2i.errors import UserError
from t2i.evaluation.store import write_generated
from t2i.files import write_text
from t2i.generation import iterate_images, pick_device
from t2i.loading import expand_folder, published_as_folder, weights_sha256
from t2i.lora import merge_lora
from t2i.tensorar.model import TensorAR


def export(
    checkpoint: Path,
    out: Path,
    *,
    base: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    prompts: Sequence[str] = (),
    samples: int = 2,
    results: Sequence[Path] = (),
    device: str = "auto",
) -> Path:
    """Write the export of a checkpoint; `out` appears when it is complete.

    Args:
        base: where the base weights are now, if they moved since the training.
        dtype: type of the stored weights; adapters are merged in fp32.
        prompts: what to draw for the model card; nothing if empty.
        samples: images of each prompt.
        results: results files of benchmarks, for the model card.
        device: where to draw.

    Raises:
        UserError: `out` exists, or something that is needed cannot be read.
    """
    if out.exists():
        raise UserError(f"{out} exists; export to a new folder")
    scores = [line for path in results for line in _score_rows(path)]
    config = read_config(find_checkpoint(checkpoint))
    model = from_pretrained(checkpoint, base=base, generation_only=False)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    merge_lora(model.backbone)
    _save(model, partial, dtype, config["training"])
    del model
    grid = None
    if prompts:
        where, precision = pick_device(device, "auto")
        # What a user of the folder gets.
        drawn = from_pretrained(
            partial / EXPORTED, generation_only=True, device=where, dtype=precision
        )
        images = iterate_images(drawn, prompts, samples_per_prompt=samples)
        entries = [{"prompt": prompt} for prompt in prompts]
        folder = partial / "samples"
        sheet = write_generated(images, entries, folder, samples_per_prompt=samples)[0]
        grid = sheet.relative_to(partial).as_posix()
    write_text(partial / "README.md", model_card(config, scores, grid))
    os.rename(partial, out)
    return out


def _save(model: TensorAR, folder: Path, dtype: torch.dtype, training: dict) -> None:
    """The merged base into `folder`, and a checkpoint folder with the codec that names it by a relative path."""
    backbone, inner = model.backbone, folder / EXPORTED
    weights = backbone.save_official(folder, dtype)
    backbone.source = replace(
        expand_folder(backbone.source),
        weights=os.path.relpath(weights, inner),
        sha256=weights_sha256(weights),
        generation_only=False,
    )
    if model.codec is not None:
        model.codec.to(dtype)
    facts = {name: training.get(name) for name in ("step", "steps")}
    save_pretrained(model, inner, tuning="codec", sampling=model.sampling, training=facts)


def _score_rows(path: Path) -> list[str]:
    """Table rows of a results file: `scores` maps names to numbers, or to {"mean", "stderr"} or {"overall", "overall_stderr"}."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        scores = results["scores"].items()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a results file with scores: {error!r}") from error
    rows = []
    for name, score in scores:
        values = score if isinstance(score, dict) else {"mean": score}
        mean = values.get("mean", values.get("overall"))
        error = values.get("stderr", values.get("overall_stderr"))
        if not isinstance(mean, int | float):
            raise UserError(f"{path}: the score {name!r} has no number under mean or overall")
        where = results.get("benchmark", path.stem)
        spread = "" if error is None else f" ± {error:.3f}"
        rows.append(f"| {where} | {name} | {mean:.3f}{spread} | {results.get('status', '')} |")
    return rows


def model_card(config: dict, scores: Sequence[str], grid: str | None) -> str:
    """README.md of an export, from a checkpoint's config.json."""
    source, training = config["backbone"], config["training"]
    run = training.get("config", {})
    base = source["weights"]
    on_hub = not Path(base).is_absolute() and base.count("/") == 1
    head = ["pipeline_tag: text-to-image", "tags: [tensorar, autoregressive]"]
    if published_as_folder(source["family"]):
        head.append("library_name: transformers")
    if on_hub:
        head.append(f"base_model: {base.partition(':')[0]}")
    recipe = {
        "base": _without_path(base),
        "what was trained": _trained(config),
        "TensorAR": _listed(config["method"]),
        "optimizer steps": training.get("step"),
        "samples per step": run.get("batch_size"),
        "data": _without_path(run.get("data", {}).get("source", "")) or None,
        "optimizer": _listed(run["optim"]) if run else None,
        "precision": run.get("engine", {}).get("precision"),
        "kit version": config["kit_version"],
    }
    lines = ["---", *head, "---", "", f"# {source['family']} with TensorAR", ""]
    lines += [_ABOUT, ""]
    lines += [f"![Samples]({grid})", ""] if grid else []
    lines += ["## Recipe", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in recipe.items() if value is not None]
    lines += ["", "## Scores", ""]
    lines += (
        ["| benchmark | score | value | status |", "|---|---|---|---|", *scores]
        if scores
        else ["None given."]
    )
    lines += ["", "## Use", "", "```python", *_usage(source["family"]), "```", ""]
    lines += ["The licence of the base model applies.", ""]
    return "\n".join(lines)


_ABOUT = (
    "An autoregressive image generator that predicts a window of overlapping codes per step and so refines what it draws "
    "(TensorAR, [arXiv 2505.16324](https://arxiv.org/abs/2505.16324)). The folder itself is the fine-tuned base model; "
    f"`{EXPORTED}/` holds TensorAR's input encoder and output decoder."
)


def _listed(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _without_path(source: str) -> str:
    """A name that may be published: of a local file or folder only its own."""
    return Path(source).name if Path(source).is_absolute() else source


def _trained(config: dict) -> str:
    own = {"full": "the backbone", "lora": "LoRA adapters (merged here)", "codec": ""}[
        config["tuning"]
    ]
    layers = "the image layers" if config.get("image_layers") else ""
    return ", ".join(part for part in (own, layers, "TensorAR's codec") if part)


def _usage(family: str) -> list[str]:
    """How to load the folder, with this kit and without it."""
    kit = [
        "from huggingface_hub import snapshot_download",
        "import t2i",
        "",
        'model = t2i.from_pretrained(snapshot_download("OWNER/NAME"))',
        'images = t2i.generate(model, ["a photo of a red circle"])',
    ]
    if not published_as_folder(family):
        return kit
    plain = "from transformers import JanusForConditionalGeneration"
    load = 'base = JanusForConditionalGeneration.from_pretrained("OWNER/NAME")  # without TensorAR'
    return [*kit, "", plain, load]


def push_to_hub(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload an export; creates the repository if need be. Returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    return str(api.upload_folder(folder_path=folder, repo_id=repo))
