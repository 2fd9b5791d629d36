"""Janus-Pro in the common training loop, its checkpoints, and exports for other libraries."""

import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import rare, text_logits
from runs import (
    PROMPTS,
    assert_same_metrics,
    assert_same_weights,
    before_step,
    metrics,
    saved_after_two_steps,
    tiny_janus_run,
    tiny_run,
    weights,
)
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration

import t2i
from launch import export, generate, train_janus
from t2i.export_folder import export as export_folder
from t2i.lora import merge_lora
from t2i.model_options import ExportOptions
from t2i.models.janus import janus_weights
from t2i.models.janus.janus_modules import CodeHead
from t2i.models.janus.janus_recipes import recipes
from t2i.processes import ALONE
from t2i.sampling import DrawOptions
from t2i.training.batches import TrainingData
from t2i.training.check import check
from t2i.training.engine import TrainingLoss
from t2i.training.loop import train
from t2i.training.start import build_model
from t2i.training.training_run import Run

EXACT = 0.0


@pytest.fixture(scope="module")
def lora(tiny_world):
    """A checkpoint after three steps of LoRA and image layers, without the understanding side."""
    options = {"tuning": "lora", "train_image_layers": True, "backbone__generation_only": True}
    return train(tiny_janus_run(tiny_world, "janus-lora", **options))


@pytest.fixture(scope="module")
def exported(lora, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    results = out.parent / "results.json"
    scores = {"overall": {"mean": 0.5, "stderr": 0.01}, "counting": 0.25}
    results.write_text(json.dumps({"benchmark": "geneval", "status": "PARTIAL", "scores": scores}))
    options = {"prompt": tuple(PROMPTS), "results": (results,), "device": "cpu"}
    return export_folder(ExportOptions(lora, out, dtype="float32", **options))


# -- training -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, files",
    [
        ({"tuning": "codec"}, set()),
        ({"tuning": "codec", "train_image_layers": True}, {"backbone.safetensors"}),
        ({"tuning": "lora"}, {"adapter"}),
        ({"tuning": "full"}, {"backbone.safetensors"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_tuning_modes_change_and_save_only_their_weights(tiny_world, options, files):
    name = "mode-janus-" + "-".join(map(str, options.values()))
    run = Run(tiny_janus_run(tiny_world, name, condition_dropout=0.5, **options))
    base = t2i.load_backbone("janus", tiny_world / "janus")
    folder, reloaded = saved_after_two_steps(run)
    live = reloaded.state_dict()
    present = {p.name for p in folder.iterdir()} & {"adapter", "backbone.safetensors"}
    assert present == files
    if options["tuning"] != "lora":
        before = base.state_dict()
        changed = {k for k in before if not torch.equal(before[k], live[f"backbone.{k}"])}
        understanding = {
            k
            for k in before
            if k.startswith(("janus.model.vision_", "janus.model.aligner", "janus.lm_head"))
        }
        layers = tuple(f"janus.{name}." for name in base.image_layers())
        everything = set(before) - understanding
        expected = {
            "codec": {
                k for k in before if k.startswith(layers) and "train_image_layers" in options
            },
            "full": everything,
        }[options["tuning"]]
        assert changed == expected
    if options["tuning"] == "codec":
        ours = text_logits(reloaded.backbone)
        assert torch.equal(ours, text_logits(base)), "the text side is untouched"


def test_image_layers_of_a_llamagen_are_trained_and_saved(tiny_world):
    run = Run(tiny_run(tiny_world, "image-layers", tuning="codec", train_image_layers=True))
    folder, _ = saved_after_two_steps(run)
    stored = load_file(folder / "backbone.safetensors")
    base = t2i.load_backbone("llamagen", tiny_world / "base").official_state_dict()
    assert stored.keys() == {"tok_embeddings.weight", "output.weight"}
    assert not any(torch.equal(stored[k], base[k]) for k in stored)


def test_lora_learns_and_draws(tiny_world, lora):
    losses = [row["train/loss"] for row in metrics(tiny_world, "janus-lora")]
    assert losses[-1] < losses[0]
    stored = load_file(lora / "adapter" / "adapter_model.safetensors")
    adapter = {k: v for k, v in stored.items() if "lora_" in k}
    assert len(adapter) == 2 * 2 * 7 and all(v.abs().max() > 0 for v in adapter.values())
    assert {k.split(".")[3] for k in stored if k not in adapter} == {
        "generation_embeddings",
        "generation_aligner",
        "generation_head",
    }
    assert not (lora / "backbone.safetensors").exists()
    whole = t2i.from_pretrained(lora, generation_only=False)
    assert whole.backbone.left_out == 0 and t2i.from_pretrained(lora).backbone.left_out > 0
    base = t2i.attach(t2i.load_backbone("janus", tiny_world / "janus"), t2i.presets.base())
    images, plain = (
        [i.tobytes() for i in t2i.generate(model, PROMPTS, batch_size=2, progress=False)]
        for model in (t2i.from_pretrained(lora), base)
    )
    assert images != plain and len(set(images)) == 2


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_world):
    options = {"steps": 4, "tuning": "lora", "train_image_layers": True, "condition_dropout": 0.3}
    options |= {"backbone__generation_only": True, "engine__gradient_checkpointing": True}
    options |= {"batch_size": 8}
    whole = train(tiny_janus_run(tiny_world, "janus-whole", **options))
    stop = before_step(1, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt), stop:
        train(tiny_janus_run(tiny_world, "janus-halves", **options))
    resumed = train(tiny_janus_run(tiny_world, "janus-halves", resume=True, **options))
    assert_same_metrics(
        metrics(tiny_world, "janus-whole"), metrics(tiny_world, "janus-halves"), EXACT
    )
    assert_same_weights(weights(whole), weights(resumed))


def test_bf16_is_close_to_fp32(tiny_world, lora):
    """The loss of one forward pass in bf16 is within 2 % of fp32. (The engine is the same for every
    family and has its own tests.)
    """
    config = tiny_janus_run(tiny_world, "-", tuning="lora", engine__micro_batch=2)
    low = replace(config, engine=replace(config.engine, precision="bf16", zero_stage=1))
    models = [build_model(c) for c in (config, low)]
    assert {p.dtype for p in models[1].parameters()} == {torch.bfloat16}
    batch = next(TrainingData(config, models[0].backbone, ALONE).micro_batches(0))
    losses = [TrainingLoss(m, "fp32")(batch)[0].item() for m in models]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_captions_are_cached_as_text(tiny_world):
    config = tiny_janus_run(tiny_world, "-")
    backbone = t2i.load_backbone("janus", tiny_world / "janus")
    data = TrainingData(config, backbone, ALONE)
    store = data.store
    assert store.manifest["text_dim"] is None
    batch = next(data.micro_batches(0))
    texts = [store.condition(i) for i in range(len(store))]
    own = [
        ids[mask].tolist()
        for ids, mask in zip(batch.prepared["ids"], batch.prepared["mask"], strict=True)
    ]
    assert all(ids in backbone.prompts.encode(texts) for ids in own) and len(own) == 4


# -- the pre-flight -------------------------------------------------------------------------------
QUICK_CHECKS = ("janus-pro-7b-full-zero3",)
"""Recipes that the default suite checks; the others are slow tests."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_CHECKS else rare(name)
        for name in recipes()
        if name.startswith("janus-pro")
    ],
)
def test_check_of_the_published_sizes_needs_no_files(name, tiny_world, monkeypatch, capsys):
    arguments = ["--data.source", tiny_world / "data", "--data.small-images", "upscale"]
    arguments += ["--data.validation-samples", 8, "--run-dir", tiny_world / "nowhere", "--check"]
    monkeypatch.setattr("sys.argv", ["train_janus.py", name, *map(str, arguments)])
    world_size = 1 if name.endswith("small-data") else 8
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    train_janus.main()
    report = capsys.readouterr().out
    left = {"1b": "519,699,456", "7b": "744,098,816"}[name.split("-")[2]]
    assert f"not loaded: {left} parameters not needed to draw images" in report
    stage = recipes()[name][1].engine.zero_stage
    marked = [line for line in report.splitlines() if line.endswith("<- chosen")]
    assert len(marked) == 1 and f"ZeRO-{stage} on {world_size} process(es)" in marked[0]
    if name == "janus-pro-7b-full-zero3":  # 6.73 G parameters x 18 bytes over 8
        assert "15.13 GB" in marked[0]
    if name == "janus-pro-1b-lora":
        trained = 24 * 16 * (4 * (2048 + 2048) + 3 * (2048 + 5632))
        assert f"language model    1,458,079,744 of which trained {trained:>15,}" in report
    assert not (tiny_world / "nowhere").exists()


def test_check_reads_local_shapes_and_refuses_bad_settings(tiny_world):
    config = tiny_janus_run(tiny_world, "-", tuning="lora", train_image_layers=True)
    model = build_model(config, device="meta")
    real = build_model(config)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in real.state_dict().items()
    }
    assert "understanding" in check(config)
    with pytest.raises(ValueError, match="full trains them anyway"):
        tiny_janus_run(tiny_world, "-", train_image_layers=True)
    with pytest.raises(ValueError, match="k=17 must be between 1 and the 16 tokens"):
        check(tiny_janus_run(tiny_world, "-", method__k=17))
    with pytest.raises(ValueError, match="brings its own prompt tokenizer"):
        check(tiny_janus_run(tiny_world, "-", backbone__text_encoder="google/flan-t5-xl"))


# -- export ---------------------------------------------------------------------------------------
def test_export_loads_in_transformers_with_the_same_logits_and_codes(tiny_world, lora, exported):
    model, report = JanusForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(report.values())
    merged = t2i.from_pretrained(lora, generation_only=False)
    unmerged = text_logits(merged.backbone)
    merge_lora(merged.backbone)
    theirs = text_logits(model, merged.backbone)
    torch.testing.assert_close(theirs, text_logits(merged.backbone), atol=0, rtol=0)
    torch.testing.assert_close(theirs, unmerged, atol=1e-4, rtol=0)
    ours, stored = merged.backbone.janus.state_dict(), model.state_dict()
    assert all(torch.equal(ours[k], stored[k]) for k in ours)
    # transformers' own image loop draws the codes that our sampler draws from the merged base.
    base = t2i.attach(t2i.load_backbone("janus", exported), t2i.presets.base())
    prepared = base.backbone.prepare(PROMPTS)
    inputs = {"input_ids": prepared["ids"], "attention_mask": prepared["mask"].long()}
    drawn = model.generate(**inputs, generation_mode="image", do_sample=False)
    config = t2i.checkpoint.SamplingConfig(temperature=0.0, cfg_scale=5.0)
    images = t2i.generation.draw_images(base, PROMPTS, DrawOptions(sampling=config), progress=False)
    assert torch.equal(drawn, torch.stack([one.windows for one in images])[:, :, 0, 0])


def test_export_draws_what_the_checkpoint_draws_and_can_be_moved(lora, exported, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "moved")
    expected, images = (
        t2i.generate(t2i.from_pretrained(f), PROMPTS, batch_size=2, progress=False)
        for f in (lora, moved)
    )
    for a, b in zip(expected, images, strict=True):
        assert a.tobytes() == b.tobytes()
    (moved / "model.safetensors").write_bytes(
        (moved / "model.safetensors").read_bytes()[:-1] + b"x"
    )
    with pytest.raises(ValueError, match="not the weight file that the checkpoint was trained on"):
        t2i.from_pretrained(moved)


def test_model_card(exported, tiny_world):
    card = (exported / "README.md").read_text()
    assert (
        card.startswith("---\npipeline_tag: text-to-image\n")
        and "library_name: transformers" in card
    )
    assert "| geneval | overall | 0.500 ± 0.010 | PARTIAL |" in card
    assert "| geneval | counting | 0.250 | PARTIAL |" in card
    assert "| what was trained | LoRA adapters + image layers + codec |" in card
    assert "![Samples](samples/grid.png)" in card and (exported / "samples" / "grid.png").is_file()
    for file in exported.rglob("*.*"):
        assert file.suffix in (".png", ".safetensors") or str(tiny_world) not in file.read_text()


def test_export_program(lora, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model"
    uploads = []

    def create(_, *names, **options):
        uploads.append((names, options))
        return SimpleNamespace(repo_id=names[0])

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda _, **k: uploads.append(k) or "address"
    )
    arguments = ["--ckpt", lora, "--out", out, "--push-to-hub", "me/mine", "--private"]
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments)])
    export.main()
    assert "uploaded to address" in capsys.readouterr().out
    assert uploads == [
        (("me/mine",), {"private": True, "exist_ok": True}),
        {"folder_path": out, "repo_id": "me/mine"},
    ]
    stored = load_file(out / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments[:4])])
    with pytest.raises(ValueError, match="exists; export to a new folder"):
        export.main()


def image_logits(layers: dict[str, torch.nn.Module]) -> torch.Tensor:
    """Logits of the image layers alone, without the trunk between them."""
    embed, align, head = (
        layers[f"model.generation_{n}"] for n in ("embeddings", "aligner", "head")
    )
    x = align(embed(torch.arange(4)))
    return head.vision_head(head.read(x)) if isinstance(head, CodeHead) else head(x)


def test_adapter_is_read_by_peft_on_transformers_model(tiny_world, lora):
    """Case 9: PEFT also loads the image layers, which were trained in full."""
    from peft import PeftModel

    theirs = JanusForConditionalGeneration.from_pretrained(tiny_world / "janus")
    ours = t2i.from_pretrained(lora, generation_only=False).backbone
    plain = text_logits(theirs, ours)
    images = image_logits({name: theirs.get_submodule(name) for name in ours.image_layers()})
    theirs = PeftModel.from_pretrained(theirs, lora / "adapter")
    torch.testing.assert_close(text_logits(theirs, ours), text_logits(ours))
    assert not torch.allclose(text_logits(theirs, ours), plain, atol=1e-3)
    loaded = theirs.base_model.model
    theirs = image_logits({name: loaded.get_submodule(name) for name in ours.image_layers()})
    assert torch.equal(theirs, image_logits(ours.image_layers()))
    assert not torch.allclose(theirs, images, atol=1e-4)


def test_a_llamagen_is_exported_in_its_own_layout(plain, tmp_path):
    out = export_folder(ExportOptions(plain, tmp_path / "model", dtype="float32"))
    exported = t2i.from_pretrained(out).state_dict()
    assert_same_weights(exported, t2i.from_pretrained(plain).state_dict())
    assert "model" in torch.load(out / "model.pt", weights_only=True)


def test_generate_program(lora, tmp_path, monkeypatch, capsys):
    arguments = [
        "--ckpt",
        lora,
        "--out",
        tmp_path / "out",
        "--samples",
        1,
        "--stages",
        "--prompt",
        *PROMPTS,
    ]
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, arguments)])
    generate.main()
    assert (tmp_path / "out" / "00001" / "samples" / "00000.png").is_file()
    assert (tmp_path / "out" / "stages.png").is_file()


def test_shipped_base_is_complete():
    assert "shapes-janus" in t2i.sources.shipped_bases()
    backbone = t2i.load_backbone("janus", "shapes-janus")
    assert backbone.spec.grid == (8, 8) and backbone.spec.sampling.cfg_scale == 2.5
    stored = set(janus_weights.vq_to_transformers(backbone.tokenizer.state_dict()))
    folder = t2i.sources.ASSETS / "shapes-janus"
    assert stored < set(load_file(folder / "model" / "model.safetensors"))
    assert sum(p.stat().st_size for p in folder.rglob("*")) <= 8e6
