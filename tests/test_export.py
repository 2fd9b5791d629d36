"""Cases 9, 28: an export of every family is self-contained and contains no path of the machine that
wrote it, and its upload can be tried again.
"""

import json
import logging
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import JANUS_PROMPTS, tiny_open_magvit2, tiny_rar
from programs import program as program_run
from programs import refused
from runs import PROMPTS, tiny_reward_run, tiny_run, write_tiny_base, write_tiny_janus

import t2i
from launch import analyze, generate
from launch import export as program
from t2i.checkpoint import save_pretrained
from t2i.errors import UserError
from t2i.evaluation.evaluation_options import BenchmarkOptions
from t2i.evaluation.runner import is_shapes_world
from t2i.export_folder import _score_rows, export, model_card
from t2i.files import write_json
from t2i.lora import add_lora
from t2i.model_options import ExportOptions
from t2i.ownership import owning
from t2i.sampling import SamplingConfig
from t2i.training.config import BackboneOptions, TrainConfig
from t2i.training.start import build_model, start_facts, start_from
from t2i.tuning import LoRAConfig


def class_base(backbone, folder):
    """Write a backbone folder of a class-conditional family, with the tokenizer in its own file."""
    folder.mkdir()
    backbone.save_official(folder, torch.float32)
    torch.save(backbone.tokenizer.state_dict(), folder / "vq.bin")
    files = {"weights": "model.pt", "tokenizer": "vq.bin"}
    config = vars(backbone.config)
    write_json(folder / "config.json", {"family": backbone.spec.family, **files, "config": config})


def magvit_with_its_tokenizer_inside(folder):
    """An Open-MAGVIT2 loaded as it is published: from one file, given by its path."""
    backbone = tiny_open_magvit2()
    folder.mkdir()
    inside = {f"first_stage_model.{k}": v for k, v in backbone.tokenizer.state_dict().items()}
    torch.save({"state_dict": backbone.official_state_dict() | inside}, folder / "AR.ckpt")
    return t2i.load_backbone("open_magvit2", folder / "AR.ckpt", config=backbone.config)


def of_family(family, folder):
    """A backbone of a family, loaded from files written to `folder`, and two conditions for it."""
    if family == "llamagen":
        return t2i.load_backbone("llamagen", write_tiny_base(folder)), PROMPTS
    if family == "janus":
        write_tiny_janus(folder)
        return t2i.load_backbone("janus", folder), JANUS_PROMPTS[:2]
    if family == "rar":
        class_base(tiny_rar(), folder)
        return t2i.load_backbone("rar", folder), [1, 3]
    return magvit_with_its_tokenizer_inside(folder), [1, 3]


@pytest.mark.parametrize("family", ["llamagen", "janus", "rar", "open_magvit2"])
def test_an_export_is_self_contained(family, tmp_path, monkeypatch):
    """It draws the checkpoint's images after the checkpoint and its base are deleted, it can be
    moved, and it contains no path.
    """
    source = tmp_path / "source"
    backbone, prompts = of_family(family, source)
    if family in ("llamagen", "janus"):
        add_lora(backbone, LoRAConfig(rank=2))
        tuning = "lora"
    else:
        tuning = "full"
    backbone.source = replace(backbone.source, text_encoder_dtype="bfloat16")
    model = t2i.attach(backbone, t2i.presets.iclr2026(k=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    run = {"data": {"source": [str(source / "pictures")]}, "optim": {"codec_lr": 1e-3}}
    options = {"tuning": tuning, "image_layers": tuning == "lora"}
    checkpoint = t2i.save_pretrained(
        model, tmp_path / "checkpoint", **options, training={"step": 3, "config": run}
    )
    asked = tuple(str(p) for p in prompts)
    options = {"dtype": "float32", "prompt": asked, "samples": 1}
    out = export(ExportOptions(checkpoint, tmp_path / "out", **options))
    assert (out / "samples" / "grid.png").is_file()
    expected = t2i.generate(t2i.from_pretrained(checkpoint), prompts, progress=False)
    shutil.rmtree(source)
    shutil.rmtree(checkpoint)
    moved = out.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    loaded = t2i.from_pretrained("moved")
    assert loaded.backbone.source.text_encoder_dtype == "bfloat16"
    drawn = t2i.generate(loaded, prompts, progress=False)
    assert [i.tobytes() for i in drawn] == [i.tobytes() for i in expected]
    for file in moved.rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file
    # The base in it can be loaded like any other base.
    base = t2i.load_backbone(family, moved)
    assert len(t2i.generate(t2i.attach(base, t2i.presets.base()), prompts[:1], progress=False)) == 1
    card = (moved / "README.md").read_text()
    assert "- base: " in card and "(float32), " in card and " MB" in card
    assert ("generate(model, [1])" in card) == (family in ("rar", "open_magvit2"))


@pytest.mark.parametrize("family", ["llamagen", "janus"])
def test_the_base_of_an_export_draws_with_the_checkpoints_settings(family, tmp_path):
    """Used to draw with the settings of the original base: a model trained to need no guidance was
    guided all the same.
    """
    backbone, _ = of_family(family, tmp_path / "source")
    model = t2i.attach(backbone, t2i.presets.iclr2026(k=2))
    model.sampling = SamplingConfig(cfg_scale=1.0, top_k=7, stride=2, draft_temperature=0.5)
    checkpoint = t2i.save_pretrained(model, tmp_path / "checkpoint", tuning="full")
    out = export(ExportOptions(checkpoint, tmp_path / "out"))
    assert t2i.from_pretrained(out).sampling == model.sampling
    if family == "janus":
        stored = json.loads((out / "generation_config.json").read_text())
        assert stored["guidance_scale"] < 1.001 and stored["top_k"] == 7
    else:
        base = t2i.load_backbone(family, out)
        assert base.spec.sampling == SamplingConfig(cfg_scale=1.0, top_k=7), "a base has no windows"


def test_an_export_remembers_its_original_base(tmp_path):
    """Case 25: for all models that descend from a base of the shapes world, GenEval uses that
    world's prompts and judge.
    """
    model = t2i.attach(t2i.load_backbone("llamagen", "shapes"), t2i.presets.base())
    old = t2i.save_pretrained(model, tmp_path / "old", tuning="codec")
    out = export(ExportOptions(old, tmp_path / "out"))
    assert start_from(out, BackboneOptions()).source.shipped_base == "shapes"
    again = t2i.save_pretrained(t2i.from_pretrained(out), tmp_path / "again", tuning="codec")
    export(ExportOptions(again, tmp_path / "second"))
    export(ExportOptions(out, tmp_path / "third"))
    assert "| base | shapes |" in (tmp_path / "third" / "README.md").read_text()
    assert is_shapes_world(BenchmarkOptions(ckpt=str(tmp_path / "second")))


@pytest.mark.parametrize("family", ["llamagen", "rar"])
def test_an_export_is_trained_further_by_a_published_recipe(family, tmp_path):
    """Its tokenizer and text encoder were fetched from the hub, by the names in the recipe, and
    then refused: an export holds them in another format.
    """
    backbone, _ = of_family(family, tmp_path / "source")
    model = t2i.attach(backbone, t2i.presets.base())
    named = {"tokenizer": "owner/repo:vq.pt"}
    if family == "llamagen":
        named["text_encoder"] = "google/flan-t5-xl"
    options = BackboneOptions(family=family, **named)
    run = t2i.save_pretrained(model, tmp_path / "run", tuning="codec")
    out = export(ExportOptions(run, tmp_path / "out", dtype="float32"))
    for folder in (run, out):
        again = start_from(folder, options)
        for name, value in backbone.tokenizer.state_dict().items():
            assert torch.equal(again.tokenizer.state_dict()[name], value)
        assert (again.frozen.text_encoder is not None) == (family == "llamagen")


def test_a_backbone_folder_keeps_its_files_under_a_published_recipe(tmp_path, caplog):
    """The hub's were fetched instead. Those that a user names on purpose gave way silently."""
    caplog.set_level(logging.INFO)
    folder = write_tiny_base(tmp_path / "base")
    hub = {"tokenizer": "owner/repo:vq.pt", "text_encoder": "google/flan-t5-xl"}
    config = TrainConfig(backbone=BackboneOptions(weights=str(folder), **hub))
    source = build_model(config).backbone.source
    assert (source.tokenizer, source.text_encoder) == (None, None)  # config.json of the folder
    start_facts(config)
    said = [line for line in caplog.messages if line.startswith("not used: ")]
    assert said == [f"not used: owner/repo:vq.pt and google/flan-t5-xl; {folder} has its own"]


def test_a_text_encoder_from_the_hub_is_named_and_not_copied(tmp_path, monkeypatch):
    base = write_tiny_base(tmp_path / "base")
    encoder = shutil.move(base / "text_encoder", tmp_path / "snapshot")
    monkeypatch.setattr("t2i.models.llamagen.t5_files.fetch_model", lambda *a, **k: encoder)
    content = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", content | {"text_encoder": "google/flan-t5-xl"})
    model = t2i.attach(t2i.load_backbone("llamagen", base), t2i.presets.iclr2026(k=2))
    checkpoint = t2i.save_pretrained(model, tmp_path / "checkpoint", tuning="codec")
    out = export(ExportOptions(checkpoint, tmp_path / "out"))
    assert not (out / "text_encoder").exists()
    assert (
        "text encoder: google/flan-t5-xl (on the hub, not copied)"
        in (out / "README.md").read_text()
    )
    assert t2i.from_pretrained(out).backbone.frozen.text_encoder.folder == encoder


def test_a_second_export_to_a_folder_at_the_same_time_is_refused(shapes_ckpt, tmp_path, capsys):
    """Case 5: it would delete the files that the first one is writing, and then fail itself."""
    with owning(tmp_path, "export", "out"):
        (tmp_path / "out.t2i-partial").mkdir()
        message = refused(program, capsys, "--ckpt", shapes_ckpt, "--out", tmp_path / "out")
        assert "is in use by process" in message and (tmp_path / "out.t2i-partial").is_dir()
    program_run(program, "--ckpt", shapes_ckpt, "--out", tmp_path / "out")
    assert not (tmp_path / "out.t2i-partial").exists()


def test_the_model_card_contains_no_paths():
    source = {"family": "rar", "weights": "/home/me/rar.bin"}
    run = {"data": {"source": ["../me/private/pictures", "/home/me/more"]}}
    config = {"backbone": source, "tuning": "full", "kit_version": "1", "method": {"k": 2}}
    card = model_card(config | {"training": {"config": run | {"optim": {}}}}, "class")
    assert "| data | pictures, more |" in card and "| base | rar.bin |" in card
    assert "/me/" not in card and "base_model" not in card
    source["weights"] = ".."  # of an export: the card used to show a folder of this machine
    card = model_card(config | {"training": {}}, "class")
    assert "| base | an export of this kit |" in card
    source["weights"] = "owner/repo:file.bin"
    assert "base_model: owner/repo" in model_card(config | {"training": {}}, "class")


def test_the_card_holds_the_whole_recipe(tmp_path):
    """It used to name neither the adapters' rank nor rewards, and called the images of a held-out
    loss the data that a model had been trained on with rewards.
    """

    def card_of(run, **changes) -> str:
        pictures = "/home/me/pictures"
        run = run(tmp_path, "x", tuning="lora", lora__rank=3, data__source=pictures, **changes)
        config = {"backbone": {"family": "rar", "weights": "rar.bin"}, "tuning": "lora"}
        config |= {"kit_version": "1", "method": asdict(run.method)}
        stored = json.loads(json.dumps(asdict(run), default=str))
        card = model_card(config | {"training": {"config": stored}}, "class")
        assert "| LoRA | rank 3, alpha 32.0, dropout 0.0 |" in card and "/me/" not in card
        return card

    card = card_of(tiny_run)
    assert "| data | pictures |" in card and "reward" not in card
    assert "| further settings | condition_dropout 0.1, token_dropout 0.0, ema 0.0, seed " in card
    card = card_of(tiny_reward_run, reward__prompts="/home/me/p.txt")
    assert "| rewards | functions ['reward_functions:brightness'], weights [], prompts p." in card
    assert "| data of the held-out loss | pictures |" in card and "token_dropout" not in card


def test_the_card_of_a_control_does_not_speak_of_tensorar(tmp_path):
    """It used to say that the model has TensorAR's codec and refines what it draws."""
    model = t2i.attach(t2i.load_backbone("llamagen", "shapes"), t2i.presets.base())
    control = t2i.save_pretrained(model, tmp_path / "control", tuning="full")
    assert "trained: backbone, " in repr(t2i.from_pretrained(control))
    card = (export(ExportOptions(control, tmp_path / "out")) / "README.md").read_text()
    assert "# llamagen, fine-tuned as usual\n" in card
    assert "| what was trained | backbone |" in card and "refines" not in card
    assert card.count("TensorAR") == 1 and "without TensorAR" in card
    assert "tags: [autoregressive]" in card and "- settings: tensorar/" in card


@pytest.mark.parametrize(
    ("kind", "asked", "call"),
    [
        ("text", None, '["a photo of a red circle, by xyz"]'),
        ("text", 'a "bus" at Zoë\'s', r"""["a \"bus\" at Zoë's"]"""),
        ("class", None, "[0]"),
        ("class", "7", "[7]"),
    ],
)
def test_sample_call_of_the_model_card(kind, asked, call):
    """The call contains the trigger words, and a class that the model has. Used to leave out the
    words, and to ask models of ten classes for class 207.
    """
    config = {"backbone": {"family": "rar", "weights": "w"}, "tuning": "full", "method": {"k": 2}}
    training = {"data": {"trigger": "{caption}, by xyz"}, "optim": {}}
    config |= {"kit_version": "1", "training": {"config": training}}
    assert f"t2i.generate(model, {call})" in model_card(config, kind, asked=asked)


@pytest.mark.parametrize(
    "facts",
    [
        {"config": "my.yaml", "data_key": "mine"},
        {"config": {"lr": 1e-4, "data": "mine"}},
        {"config": {"data": {"source": 5}}},
        {"config": {"data": {"source": ["a", 5]}}},
    ],
)
def test_facts_of_the_users_own_are_not_taken_for_a_runs(tmp_path, monkeypatch, facts):
    """They ended in tracebacks."""
    monkeypatch.chdir(tmp_path)
    backbone = t2i.load_backbone("llamagen", write_tiny_base(tmp_path / "base"))
    model = t2i.attach(backbone, t2i.presets.base())
    save_pretrained(model, tmp_path / "ckpt", tuning="codec", training=facts)
    export(ExportOptions(tmp_path / "ckpt", tmp_path / "export"))
    few = ("--ckpt", tmp_path / "ckpt", "--prompt", "a dog", "--samples", 1)
    program_run(generate, *few)
    program_run(analyze, *few, "--out", tmp_path / "analysis")


def test_trigger_words_of_a_wrong_type_are_named_with_their_file(tmp_path):
    """The message named no file; an export ended with it after all weights were written."""
    model = t2i.attach(
        t2i.load_backbone("llamagen", write_tiny_base(tmp_path / "b")), t2i.presets.base()
    )
    save_pretrained(model, tmp_path / "ckpt", tuning="codec", training={"trigger": 5})
    with pytest.raises(UserError, match=r"ckpt/config.json: data.trigger is 5, which is not"):
        export(ExportOptions(tmp_path / "ckpt", tmp_path / "export"))


def test_prompts_without_trigger_words_are_reported(tmp_path, caplog, monkeypatch):
    """When drawing with the run's checkpoint, with its export, and with an export of that."""
    monkeypatch.chdir(tmp_path)
    backbone = t2i.load_backbone("llamagen", write_tiny_base(tmp_path / "base"))
    run = {"data": {"trigger": "drawn by <xyz>"}, "optim": {}}
    model = t2i.attach(backbone, t2i.presets.base())
    save_pretrained(model, tmp_path / "ckpt", tuning="codec", training={"config": run})
    export(ExportOptions(tmp_path / "ckpt", tmp_path / "one"))
    export(ExportOptions(tmp_path / "one", tmp_path / "two"))
    assert "| trigger words | drawn by \\<xyz> |" in (tmp_path / "two" / "README.md").read_text()
    for name in ("ckpt", "one", "two"):
        caplog.clear()
        asked = ("--prompt", "a dog", "a cat", "a cat drawn by <xyz>", "--samples", 1)
        program_run(generate, "--ckpt", tmp_path / name, *asked)
        said = [line for line in caplog.messages if "trigger words" in line]
        assert len(said) == 1 and said[0].startswith("'a dog' (and 1 more)"), name
        assert "'drawn by <xyz>, a dog' has them" in said[0]


def test_missing_scores_are_shown_as_dashes(tmp_path):
    """FID has no precision for few images, and DPG-Bench no official mean if no prompt counts."""
    scores = {"fid": 3.25, "precision": None, "overall": {"mean": None, "stderr": None}}
    write_json(tmp_path / "results.json", {"benchmark": "FID", "scores": scores})
    shown = [row[1:3] for row in _score_rows(tmp_path / "results.json", {})]
    assert shown == [("fid", "3.250"), ("precision", "-"), ("overall", "-")]


def test_a_card_names_the_judge_and_takes_no_other_models_scores(tmp_path):
    config = {"training": {"step": 4}, "method": {"k": 4}}
    about = {"checkpoint": "runs/a/checkpoints/step_000004", "step": 4, "method": {"k": 4}}

    def rows(**facts):
        scores = {"benchmark": "GenEval", "label": "shapes prompts", "scores": {"overall": 0.5}}
        write_json(tmp_path / "results.json", scores | facts)
        return _score_rows(tmp_path / "results.json", config)

    (row,) = rows(generation={"about": about})
    assert row[:3] == ("GenEval, shapes prompts", "overall", "0.500")
    assert rows(generation=None) == rows() == [row], "images of another program"
    for method in ({"k": 4, "stride": 1}, {}):
        assert rows(generation={"about": about | {"method": method}}) == [row], "another version"
    for other, who in (
        (about | {"step": 9}, "runs/a/checkpoints"),
        (about | {"method": {"k": 1}}, "runs/a/checkpoints"),
        ({"backbone": {}}, "a base by itself"),
    ):
        with pytest.raises(t2i.UserError, match=f"holds scores of {who}.*not what is exported"):
            rows(generation={"about": other})


# -- case 28: the upload --------------------------------------------------------------------------
def test_upload_without_a_network(shapes_ckpt, tmp_path, capsys, monkeypatch):
    """A hub that cannot be reached is noticed before exporting. If the upload fails later, the same
    command uploads the finished export.
    """
    out, push = tmp_path / "out", ("--push-to-hub", "me/mine")
    arguments = ("--ckpt", shapes_ckpt, "--out", out)
    message = refused(program, capsys, *arguments, *push)
    assert "cannot write to me/mine on the hub" in message and not out.exists()
    assert "'me/mine/x'" in refused(program, capsys, *arguments, "--push-to-hub", "me/mine/x")

    def broken(*args, **kwargs):
        raise ConnectionError("the line is down\nand more")

    created = SimpleNamespace(repo_id="me/mine")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: created)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", broken)
    push = ("--push-to-hub", "mine")  # the hub takes names without an owner only for creating
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments + push)])
    with pytest.raises(
        t2i.UserError, match=r"is complete, but could not be uploaded.*line is down"
    ):
        program.main()
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    uploads = []
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **k: uploads.append(k))
    program.main()
    assert uploads == [{"folder_path": out, "repo_id": "me/mine"}]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == written
    other = shutil.copytree(shapes_ckpt, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    monkeypatch.setattr(
        "t2i.export_folder.read_config", lambda f: json.loads((f / "config.json").read_text())
    )
    assert "exists; export to a new folder" in refused(
        program, capsys, "--ckpt", other, "--out", out, *push
    )


def test_a_program_bug_keeps_its_traceback(monkeypatch):
    from t2i.export_folder import prepare_upload

    def wrong(*args, **kwargs):
        raise KeyError("ours")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", wrong)
    with pytest.raises(KeyError):
        prepare_upload("me/mine")


def test_bad_options_are_refused_before_exporting(shapes_ckpt, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("gone")
    for out in (tmp_path / "file" / "out", tmp_path / "link"):
        assert "cannot write" in refused(program, capsys, "--ckpt", shapes_ckpt, "--out", out)
    arguments = ("--ckpt", shapes_ckpt, "--out", tmp_path / "new" / "out", "--base.weights")
    assert "nowhere is not a file" in refused(program, capsys, *arguments, "nowhere")
    assert not (tmp_path / "new").exists()
    arguments = ("--ckpt", shapes_ckpt, "--out", tmp_path / "out", "--device", "cuda")
    assert "found no GPU" in refused(program, capsys, *arguments)
    arguments = ("--ckpt", shapes_ckpt, "--out", tmp_path / "out", "--prompt", "a", "--samples", 0)
    assert "samples=0 must be at least 1" in refused(program, capsys, *arguments)
    arguments = ("--ckpt", shapes_ckpt, "--out", tmp_path / "out", "--prompt", "a", " ")
    assert "a --prompt is empty" in refused(program, capsys, *arguments)
    arguments = ("--ckpt", shapes_ckpt, "--out", tmp_path / "out", "--base.grid", 4, 4)
    assert "--base.grid: the checkpoint has its own" in refused(program, capsys, *arguments)
    for score in ('"x"', "NaN", '{"mean": 1, "stderr": "x"}'):
        (results := tmp_path / "results.json").write_text(f'{{"scores": {{"a": {score}}}}}')
        arguments = ("--ckpt", shapes_ckpt, "--out", tmp_path / "out", "--results", results)
        assert "the score 'a' has no number" in refused(program, capsys, *arguments)


def test_weights_too_large_for_the_dtype_are_not_exported(tmp_path):
    """Used to export infinities (float16 ends at 65504), and the export could not be loaded."""
    backbone, _ = of_family("llamagen", tmp_path / "source")
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[0] = 1e5
    model = t2i.attach(backbone, t2i.presets.base())
    checkpoint = t2i.save_pretrained(model, tmp_path / "checkpoint", tuning="full")
    with pytest.raises(
        t2i.UserError, match=r"this model in torch.float16 holds numbers .* not finite"
    ):
        export(ExportOptions(checkpoint, tmp_path / "out", dtype="float16"))
    assert not (tmp_path / "out").exists()
