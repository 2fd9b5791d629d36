"""Exports a checkpoint as a self-contained folder with a model card.

OUT/             the base with everything that training changed, adapters merged: in its authors'
                 layout if they publish a folder, else a backbone folder (config.json, model.pt,
                 tokenizer.safetensors, text_encoder/)
OUT/tensorar/    a checkpoint folder with the codec; its base is its parent folder
OUT/samples/     images drawn with both, and grid.png
OUT/README.md    the model card: recipe, scores, samples, how to load it

Nothing in it refers to a path on the machine that wrote it. One part may be left out: a text
encoder from the hub is named by its hub id, not copied.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from t2i.checkpoint import from_pretrained, save_pretrained, trained_parts
from t2i.checkpoint_folders import EXPORTED, choose_checkpoint, find_checkpoint, read_config
from t2i.errors import UserError
from t2i.evaluation.draw import PromptRequest, draw_prompts
from t2i.evaluation.generation_folder import write_sheets
from t2i.evaluation.results import markdown_table
from t2i.fields import read_object
from t2i.files import file_sha256, replacing_folder, writable_folder, write_json, write_text
from t2i.generation import all_jobs, parse_conditions, unpadded
from t2i.loading import pick_device
from t2i.lora import merge_lora
from t2i.manifest import MANIFEST, refuse_in_checkpoint
from t2i.model_options import ExportOptions
from t2i.models.families import Family, find_family
from t2i.ownership import owning
from t2i.progress import readable_size
from t2i.published import asking_hub
from t2i.sampling import DrawOptions
from t2i.sources import BackboneSource, absolute, expand_folder, shipped_bases
from t2i.tensorar.model import TensorAR
from t2i.training.trigger_words import (
    TRIGGER,
    remind_of_trigger,
    run_settings,
    trigger_of,
    with_trigger,
)
from t2i.weights import refuse_not_finite, save_weights

log = logging.getLogger(__name__)

_TOKENIZER, _TEXT_ENCODER = "tokenizer.safetensors", "text_encoder"
_ABOVE = ".."  # the base of an export's checkpoint
_HUB_ADVICE = (
    "Log in with `hf auth login`, with a token that may write there; HF_HUB_OFFLINE must not be set. "
    "Running the same command again continues from here"
)


def export(options: ExportOptions) -> Path:
    """Write the export of a checkpoint; `options.out` appears when it is complete."""
    out, base = options.out, options.base
    if out.exists():
        raise UserError(f"{out} exists; export to a new folder")
    refuse_in_checkpoint(out, "--out")
    where, precision = pick_device(options.device, "auto")
    checkpoint = choose_checkpoint(options.ckpt)
    config = read_config(checkpoint)
    scores = [line for path in options.results for line in _score_rows(path, config)]
    writable_folder(out, make=False)
    model = from_pretrained(
        checkpoint,
        base=base.weights,
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        generation_only=False,
        device="cpu",
        dtype=torch.float32,
    )
    parse_conditions(model.backbone, options.prompt)  # reports invalid prompts before the work
    kind = model.backbone.spec.cond_kind
    remind_of_trigger(checkpoint, options.prompt)
    with owning(out.parent, "export", out.name), replacing_folder(out) as partial:
        merge_lora(model.backbone)
        facts = {name: config["training"].get(name) for name in ("step", "steps")}
        facts[TRIGGER] = trigger_of(config["training"])
        facts["exported_from"] = _fingerprint(checkpoint)
        parts = _save(model, partial, getattr(torch, options.dtype), facts)
        del model
        grid = None
        if options.prompt:
            # Draw with the exported files, as a user of the folder will.
            drawn = from_pretrained(partial / EXPORTED, device=where, dtype=precision)
            entries = [{"prompt": prompt} for prompt in options.prompt]
            folder, count = partial / "samples", options.samples
            jobs = all_jobs(range(len(entries)), count)
            request = PromptRequest(drawn, entries, unpadded(drawn, DrawOptions(), len(jobs)))
            draw_prompts(request, jobs, folder, show_steps=True)
            sheet = write_sheets(folder, entries, samples_per_prompt=count)[0]
            grid = sheet.relative_to(partial).as_posix()
        for part in parts:
            log.info("  %s", part)
        card = model_card(
            config, kind, scores=scores, grid=grid, parts=parts, asked=(*options.prompt, None)[0]
        )
        write_text(partial / "README.md", card)
    return out


def is_exported(checkpoint: Path, out: Path) -> bool:
    """Whether `out` is this checkpoint's complete export; False if it does not exist.

    Raises:
        UserError: it holds something else, or there is no such checkpoint.
    """
    checkpoint = find_checkpoint(checkpoint)
    read_config(checkpoint)
    if not out.exists():
        return False
    if (out / EXPORTED / MANIFEST).is_file():
        facts = read_config(out / EXPORTED)["training"]
        if facts.get("exported_from") == _fingerprint(checkpoint):
            return True
    raise UserError(f"{out} exists; export to a new folder (it is not an export of {checkpoint})")


def _fingerprint(checkpoint: Path) -> str:
    """Identifies a checkpoint without its path."""
    return file_sha256(checkpoint / MANIFEST) + file_sha256(checkpoint / "config.json")


def _save(model: TensorAR, folder: Path, dtype: torch.dtype, facts: dict) -> list[str]:
    """Write the merged base to `folder`, and the checkpoint folder with the codec inside it.

    Returns a line on each part of the model: its name, where it is, and its size.
    """
    backbone = model.backbone
    assert backbone.source is not None, "it comes from a checkpoint"
    files, base = expand_folder(backbone.source), backbone.source.weights
    # The exported base alone also draws with the checkpoint's settings: a model trained without
    # guidance must not use guidance because its original base did.
    own = model.sampling.of_base()
    backbone.spec = replace(backbone.spec, sampling=own)
    backbone.to(dtype)  # in place: a converted copy would take half as much memory again
    advice = "they are too large for this type; choose --dtype bfloat16 or float32"
    refuse_not_finite(backbone.official_state_dict(), f"this model in {dtype}", advice)
    weights = backbone.save_official(folder, dtype)
    place = "all files except those below"  # if the authors' layout is a folder
    if weights != folder:
        place = weights.name
        write_json(folder / "config.json", _backbone_folder(model, files, weights, folder))
    stored = str(dtype).removeprefix("torch.")
    parts = [f"base: {place} ({stored}), {_size(weights)}"]
    if (folder / _TOKENIZER).exists():
        parts.append(f"image tokenizer: {_TOKENIZER}, {_size(folder / _TOKENIZER)}")
    if files.text_encoder is not None:
        copied = (folder / _TEXT_ENCODER).exists()
        size = _size(folder / _TEXT_ENCODER if copied else backbone.frozen.text_encoder.folder)
        hub = f"{files.text_encoder} (on the hub, not copied)"
        parts.append(f"text encoder: {_TEXT_ENCODER + '/' if copied else hub}, {size}")
    backbone.source = BackboneSource(
        files.family,
        _ABOVE,
        text_encoder_dtype=files.text_encoder_dtype,
        config=asdict(backbone.config),
        sampling=asdict(own),
        shipped_base=files.shipped_base or (base if base in shipped_bases() else None),
    )
    if model.codec is not None:
        model.codec.to(dtype)
    inner = folder / EXPORTED
    save_pretrained(model, inner, tuning="codec", sampling=model.sampling, training=facts)
    name = "settings" if model.codec is None else "TensorAR"
    return [*parts, f"{name}: {EXPORTED}/, {_size(inner)}"]


def _backbone_folder(model: TensorAR, files: BackboneSource, weights: Path, folder: Path) -> dict:
    """Write a base's other files; returns the content of the backbone folder's config.json."""
    frozen = model.backbone.frozen
    content = {"family": files.family, "weights": weights.name}
    if frozen.tokenizer is not None:
        save_weights(folder / _TOKENIZER, frozen.tokenizer.state_dict())
        content["tokenizer"] = _TOKENIZER
    if files.text_encoder is not None:
        content["text_encoder"] = files.text_encoder
        if Path(files.text_encoder).is_dir():
            frozen.text_encoder.copy_files(folder / _TEXT_ENCODER)
            content["text_encoder"] = _TEXT_ENCODER
    config, sampling = model.backbone.config, model.backbone.spec.sampling
    return {**content, "config": asdict(config), "sampling": asdict(sampling)}


def _size(path: Path) -> str:
    """The size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return readable_size(sum(p.stat().st_size for p in files))


def _score_rows(path: Path, config: dict) -> list[tuple]:
    """Table rows for a results file, whose `scores` maps names to numbers or {"mean", "stderr"}.

    config: the config.json of the checkpoint that the card describes.
    """
    results = read_object(path)
    if not isinstance(results.get("scores"), dict):
        raise UserError(f"{path} is not a results file with scores")
    _refuse_other_model(results, path, config)
    where = results.get("benchmark", path.stem)
    if judged := results.get("label"):  # which prompts, and who judged: not always the official
        where = f"{where}, {judged}"
    rows = []
    for name, score in results["scores"].items():
        values = score if isinstance(score, dict) else {"mean": score}
        mean, stderr = values.get("mean", ""), values.get("stderr")
        numbers = [number for number in (mean, stderr) if number is not None]
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise UserError(f'{path}: the score {name!r} has no number under "mean" or "stderr"')
        shown = "-" if mean is None else f"{mean:.3f}"  # None: nothing was scored
        spread = "" if mean is None or stderr is None else f" ± {stderr:.3f}"
        rows.append((where, name, f"{shown}{spread}", results.get("status", "")))
    return rows


def _refuse_other_model(results: dict, path: Path, config: dict) -> None:
    """UserError if the results say that they are of another model than this checkpoint."""
    drawn = results.get("generation")
    about = drawn.get("about") if isinstance(drawn, dict) else None
    if not isinstance(about, dict) or not about:
        return  # images of another program: only the user knows what drew them
    step, method = about.get("step"), about.get("method")
    # Other versions of the kit have other settings: only those that both know can differ.
    same = isinstance(method, dict) and all(
        method.get(name, value) == value for name, value in config["method"].items()
    )
    if not same or step != config["training"].get("step"):
        who = about.get("checkpoint") or "a base by itself"
        raise UserError(
            f"{path} holds scores of {who}, which is not what is exported here; "
            "give --results of this checkpoint"
        )


def model_card(
    config: dict,
    cond_kind: str,
    *,
    scores: Sequence[tuple] = (),
    grid: str | None = None,
    parts: Sequence[str] = (),
    asked: str | None = None,
) -> str:
    """README.md of an export, from a checkpoint's config.json and its `BackboneSpec.cond_kind`.

    asked: the prompt in the example call.
    """
    source, training = config["backbone"], config["training"]
    family, draws_classes = find_family(source["family"]), cond_kind == "class"
    control = config["method"]["k"] == 1
    base = source["weights"]
    if {*Path(base).parts} == {_ABOVE}:  # an export, which does not record its original base
        base = source.get("shipped_base") or "an export of this kit"
    pipeline = "unconditional-image-generation" if draws_classes else "text-to-image"
    head = [f"pipeline_tag: {pipeline}", f"tags: [{'' if control else 'tensorar, '}autoregressive]"]
    if family.library is not None:
        head.append(f"library_name: {family.library}")
    if _public_name(base) == base and base.count("/") == 1:
        head.append(f"base_model: {base.partition(':')[0]}")
    call = f"[{asked or 0}]"  # class 0 always exists
    if not draws_classes:
        call = f"[{json.dumps(asked or with_trigger(training, _PROMPT), ensure_ascii=False)}]"
    how = ", fine-tuned as usual" if control else " with TensorAR"
    lines = ["---", *head, "---", "", f"# {source['family']}{how}", ""]
    lines += [_ABOUT_CONTROL if control else _ABOUT, ""]
    lines += [f"![Samples]({grid})", ""] if grid else []
    recipe = {"base": _public_name(base), **_recipe(config)}
    known = [(name, value) for name, value in recipe.items() if value not in (None, "")]
    lines += ["## Recipe", "", markdown_table(("", ""), known), "", "## Scores", ""]
    columns = ("benchmark", "score", "value", "status")
    lines += [markdown_table(columns, scores) if scores else "None given."]
    lines += ["", "## Files", "", *(f"- {part}" for part in parts)] if parts else []
    lines += ["", "## Use", "", "```python", *_usage(family, call), "```", ""]
    lines += ["The license of the base model applies.", ""]
    return "\n".join(lines)


def _recipe(config: dict) -> dict[str, object]:
    """How a checkpoint was trained, from its config.json; None for what is not known."""
    training, k = config["training"], config["method"]["k"]
    run = run_settings(training)
    data = run.get("data", {}).get("source") or []
    places = data if isinstance(data, list) else [data]
    rewards = {name: _public_name(str(value)) for name, value in run.get("reward", {}).items()}
    further = ("ema", "seed") if rewards else ("condition_dropout", "token_dropout", "ema", "seed")
    return {
        "what was trained": trained_parts(config["tuning"], config.get("image_layers", False), k),
        "LoRA": _listed(run.get("lora", {})) if config["tuning"] == "lora" else None,
        "TensorAR": _listed(config["method"]) if k > 1 else None,
        "rewards": _listed({name: rewards[name] for name in _OF_REWARDS if name in rewards}),
        "optimizer steps": training.get("step"),
        "samples per step": run.get("batch_size"),
        f"data{' of the held-out loss' if rewards else ''}": ", ".join(
            _public_name(str(place)) for place in places
        ),
        "trigger words": trigger_of(training),
        "optimizer": _listed(run["optim"]) if "optim" in run else None,
        "further settings": _listed({name: run[name] for name in further if name in run}),
        "precision": run.get("engine", {}).get("precision"),
        "kit version": config["kit_version"],
    }


_OF_REWARDS = (
    *("functions", "weights", "prompts", "tasks", "group", "cfg_scale", "temperature", "updates"),
    *("kl", "start_cfg_scale", "start_temperature"),
)
"""What the weights of reward fine-tuning depend on."""
_ABOUT = (
    "An autoregressive image generator that predicts a window of overlapping codes per step and so "
    "refines what it draws (TensorAR, [arXiv 2505.16324](https://arxiv.org/abs/2505.16324)). The "
    f"folder itself is the fine-tuned base model; `{EXPORTED}/` holds TensorAR's input encoder and "
    "output decoder."
)
_ABOUT_CONTROL = "An autoregressive image generator, fine-tuned without TensorAR (the control)."
_PROMPT = "a photo of a red circle"


def _listed(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _public_name(source: str) -> str:
    """A name that may be published: for a local path, only its last part."""
    local = source.startswith(("/", ".", "~", "\\")) or source.count("/") > 1 or ":\\" in source
    return absolute(source).name if local or Path(source).exists() else source


def _usage(family: Family, asked: str) -> list[str]:
    """Code that loads the folder and draws images with this kit, and code to load it without."""
    kit = [
        "from huggingface_hub import snapshot_download",
        "import t2i",
        "",
        'model = t2i.from_pretrained(snapshot_download("OWNER/NAME"))',
        f"images = t2i.generate(model, {asked})",
    ]
    return [*kit, *(["", *family.library_usage] if family.library_usage else [])]


# -- the hub ---------------------------------------------------------------------------------------
def prepare_upload(repo: str, *, private: bool = False) -> str:
    """Create the repository if needed, so that anything that prevents an upload is found before
    the export. Returns its full name, with the user's own if `repo` names no owner.
    """
    from huggingface_hub import HfApi

    with asking_hub(f"cannot write to {repo} on the hub", _HUB_ADVICE):
        return HfApi().create_repo(repo, private=private, exist_ok=True).repo_id


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload an export to a repository that exists (`prepare_upload`). Returns its address.

    Raises:
        UserError: the upload failed; the folder is unchanged.
    """
    from huggingface_hub import HfApi

    with asking_hub(f"{folder} is complete, but could not be uploaded to {repo}", _HUB_ADVICE):
        return str(HfApi().upload_folder(folder_path=folder, repo_id=repo))
