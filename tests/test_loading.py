"""Cases 8, 25, 26: a base's moved files are found and verified, settings may be partial, and runs
may start from a checkpoint.
"""

import json
import os
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from helpers import tiny_llamagen, tiny_rar, tiny_vq
from huggingface_hub import save_torch_state_dict
from runs import PROMPTS, assert_same_weights, tiny_run, weights, write_tiny_base
from safetensors.torch import load_file, save_file

import t2i
from t2i import published
from t2i.checkpoint import load_model
from t2i.checkpoint_folders import is_checkpoint
from t2i.files import file_sha256, write_json
from t2i.loading import load_backbone
from t2i.manifest import write_manifest
from t2i.model_options import BaseOptions, ModelOptions
from t2i.models.llamagen.llamagen_model import SIZES, LlamaGen
from t2i.published import remembered_sha256
from t2i.sources import family_of
from t2i.training.config import BackboneOptions
from t2i.training.loop import train
from t2i.training.start import build_model, start_from


# -- case 8: moved files --------------------------------------------------------------------------
@pytest.fixture
def trained(tiny_world, tmp_path):
    """A folder of local files (weights, tokenizer, text encoder), and a checkpoint trained from
    them by their paths.
    """
    files = write_tiny_base(tmp_path / "files")
    (files / "tokenizers").mkdir()
    (files / "vq.pt").rename(files / "tokenizers" / "vq.pt")
    config = json.loads((files / "config.json").read_text())["config"]
    (files / "config.json").unlink()
    shape = load_backbone("llamagen", tiny_world / "base").config
    assert config == json.loads(json.dumps(asdict(shape)))
    backbone = load_backbone(
        "llamagen",
        files / "gpt.pt",
        tokenizer=files / "tokenizers" / "vq.pt",
        text_encoder=files / "text_encoder",
        config=shape,
    )
    model = t2i.attach(backbone, t2i.presets.iclr2026(k=2))
    return files, t2i.save_pretrained(model, tmp_path / "checkpoint", tuning="codec"), model


def test_one_folder_finds_all_moved_files(trained, tmp_path):
    files, folder, model = trained
    moved = files.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="files that are gone") as error:
        t2i.from_pretrained(folder)
    for name, option in (
        ("gpt.pt", "--base.weights"),
        ("vq.pt", "--base.tokenizer"),
        ("text_encoder", "--base.text-encoder"),
    ):
        assert name in str(error.value) and option in str(error.value)
    expected = t2i.generate(model, PROMPTS, progress=False)
    found = [
        t2i.from_pretrained(folder, base=moved),
        t2i.from_pretrained(folder, base=moved / "gpt.pt"),  # the files next to it are found, too
        t2i.from_pretrained(
            folder,
            base=shutil.copy(moved / "gpt.pt", tmp_path / "renamed.pt"),
            tokenizer=moved / "tokenizers" / "vq.pt",
            text_encoder=moved / "text_encoder",
        ),
    ]
    for again in found:
        drawn = t2i.generate(again, PROMPTS, progress=False)
        assert [i.tobytes() for i in drawn] == [i.tobytes() for i in expected]


@pytest.mark.parametrize(
    "places",
    [
        {"base": "elsewhere"},
        {"base": "elsewhere/gpt.pt"},
        {"base": "elsewhere", "tokenizer": "elsewhere/tokenizers/vq.pt"},
    ],
)
def test_moved_files_may_be_given_by_a_relative_path(trained, tmp_path, monkeypatch, places):
    """A checkpoint saved from a model loaded this way loads from any working directory."""
    files, folder, _ = trained
    files.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    model = t2i.from_pretrained(folder, **places)
    again = t2i.save_pretrained(model, tmp_path / "again", tuning="codec")
    monkeypatch.chdir("/")
    assert_same_weights(t2i.from_pretrained(again).state_dict(), model.state_dict())


def test_a_moved_backbone_folder_may_be_given_by_a_relative_path(tmp_path, monkeypatch):
    files = write_tiny_base(tmp_path / "files")
    model = t2i.attach(load_backbone("llamagen", files), t2i.presets.iclr2026(k=2))
    folder = t2i.save_pretrained(model, tmp_path / "checkpoint", tuning="codec")
    files.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    moved = t2i.from_pretrained(folder, base="elsewhere")
    again = t2i.save_pretrained(moved, tmp_path / "again", tuning="codec")
    monkeypatch.chdir("/")
    assert_same_weights(t2i.from_pretrained(again).state_dict(), model.state_dict())


def test_the_error_names_only_the_missing_part(trained, tmp_path):
    files, folder, _ = trained
    moved = files.rename(tmp_path / "elsewhere")
    shutil.rmtree(moved / "tokenizers")
    with pytest.raises(ValueError, match=r"vq\.pt \(image tokenizer: --base\.tokenizer") as error:
        t2i.from_pretrained(folder, base=moved)
    assert "gpt.pt" not in str(error.value) and "text_encoder (" not in str(error.value)


def test_a_base_without_the_files_is_refused(trained, tmp_path):
    """A missing one was reported as an image tokenizer with another hash, or not at all."""
    _, folder, _ = trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for base, said in (
        (tmp_path / "none", "none is not a file, a folder"),
        (tmp_path / "loop", "loop is a link to loop, which does not exist"),
        (tmp_path / "empty", r"empty holds none of the base's files \(.*gpt\.pt, .*vq\.pt, "),
    ):
        with pytest.raises(t2i.UserError, match=said):
            t2i.from_pretrained(folder, base=base)


@pytest.mark.parametrize("part", ["weights", "tokenizer", "text_encoder"])
def test_a_changed_file_is_refused(trained, part):
    files, folder, _ = trained
    if part == "text_encoder":
        path = files / "text_encoder" / "config.json"
        path.write_text(path.read_text() + "\n")
    else:
        path = files / ("gpt.pt" if part == "weights" else "tokenizers/vq.pt")
        content = torch.load(path, weights_only=True)
        next(iter(content.get("model", content).values())).add_(1)
        torch.save(content, path)
    named = {"weights": "weight file", "tokenizer": "image tokenizer"}.get(part, "text encoder")
    with pytest.raises(ValueError, match=f"is not the {named} that the checkpoint was trained on"):
        t2i.from_pretrained(folder)


def test_a_fully_tuned_model_does_not_need_the_bases_weights(tiny_world, trained, tmp_path):
    files, _, model = trained
    folder = t2i.save_pretrained(model, tmp_path / "full", tuning="full")
    (files / "gpt.pt").unlink()
    moved = files.rename(tmp_path / "elsewhere")
    again = t2i.from_pretrained(folder, base=moved)
    assert_same_weights(again.state_dict(), model.state_dict())


# -- hashes ---------------------------------------------------------------------------------------
def test_large_files_are_hashed_once(tmp_path, monkeypatch):
    """Case 26: the hash of a large file is remembered until the file changes in any way. That of a
    file written just now is not trusted: the file may change again unnoticed.
    """
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(published, "_LARGE", 10)
    read = []
    monkeypatch.setattr(published, "file_sha256", lambda p: read.append(p) or file_sha256(p))
    path = tmp_path / "weights"
    path.write_bytes(b"0123456789abcdef")
    first = remembered_sha256(path)
    assert remembered_sha256(path) == first and len(read) == 2  # too young
    monkeypatch.setattr(published, "_SETTLED", -(10**12))
    assert remembered_sha256(path) == remembered_sha256(path) == first and len(read) == 2
    before = path.stat()
    path.write_bytes(b"0123456789abcdeX")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert remembered_sha256(path) == file_sha256(path) != first
    for entry in (tmp_path / "cache" / "hashes").iterdir():
        entry.write_text('{"file": 3')
    assert remembered_sha256(path) == file_sha256(path)
    monkeypatch.setenv("T2I_CACHE", str(path / "no-folder"))
    assert remembered_sha256(path) == file_sha256(path)


# -- settings of a folder -------------------------------------------------------------------------
def test_sampling_settings_change_only_what_they_name(tmp_path):
    """Case 26. Used to reset the rest: {"top_k": 100} also set the family's guidance scale to 1."""
    backbone = tiny_rar()
    torch.save(backbone.official_state_dict(), tmp_path / "rar.bin")
    content = {"family": "rar", "weights": "rar.bin", "config": vars(backbone.config)}
    write_json(tmp_path / "config.json", {**content, "sampling": {"top_k": 7}})
    loaded = load_backbone("rar", tmp_path)
    own = loaded.spec.sampling
    assert own == replace(backbone.spec.sampling, top_k=7) and own.cfg_scale > 1
    assert t2i.attach(loaded, t2i.presets.iclr2026()).sampling == own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 3}, "weights is 3, but must be of type str"),
        ({"family": ["rar"]}, "family is .*must be of type str"),
        ({"config": "large"}, "config is 'large', but must be of type dict"),
        ({"config": {"dim": 32}}, "lacks n_layer"),
        ({"config": {"width": 32}}, "does not know: width"),
        ({"sampling": {"top_k": "many"}}, "top_k is 'many', which is not of the type"),
        ({"sampling": {"topk": 1}}, "does not know: topk"),
        ({"sampling": {"top_p": 7.0}}, r"top_p=7\.0 must be above 0 and at most 1"),
        ({"sampling": []}, "sampling is .*must be of type dict"),
        ({"sampilng": {"top_k": 1}}, "has sampilng, which is none of family, weights"),
    ],
)
def test_wrong_settings_of_a_backbone_folder_are_named(tmp_path, change, message):
    backbone = tiny_rar()
    torch.save(backbone.official_state_dict(), tmp_path / "rar.bin")
    content = {"family": "rar", "weights": "rar.bin", "config": vars(backbone.config)}
    write_json(tmp_path / "config.json", content | change)
    with pytest.raises(t2i.UserError, match=message):
        load_backbone("rar", tmp_path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"dim": -1}, "dim=-1 must be at least 1"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"grid": [4, 0]}, r"grid=\(4, 0\) must be at least 1"),
        ({"dropout": -0.5}, "dropout=-0.5 must be at least 0"),
        ({"dropout": 2}, "dropout=2 must be at most 1"),
        ({"n_head": 3}, "dim=32 must be a multiple of n_head=3"),
        ({"n_layer": 10**9}, "n_layer=1000000000 must be at most 1000"),  # loaded without end
        ({"vocab_size": 10**12}, "vocab_size=1000000000000 must be at most 1048576"),
        ({"grid": [4000, 4]}, r"grid=\(4000, 4\) must be at most 1024"),
        ({"dim": 1 << 20}, r"mis-shaped \(\d+\): "),  # "not enough memory"
    ],
)
def test_impossible_sizes_of_a_backbone_folder_are_named(tmp_path, size, message):
    backbone = tiny_rar()
    torch.save(backbone.official_state_dict(), tmp_path / "rar.bin")
    content = {"family": "rar", "weights": "rar.bin", "config": vars(backbone.config) | size}
    write_json(tmp_path / "config.json", content)
    with pytest.raises(t2i.UserError, match=message):
        load_backbone("rar", tmp_path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"n_head": 16, "dim": 32}, r"dim / n_head = 2 must be a multiple of 4"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head=4 must be a multiple of n_kv_head=3"),
        ({"rope_base": 0.0}, r"rope_base=0\.0 must be above 0"),
    ],
)
def test_heads_that_cannot_be_rotated_or_shared_are_named(size, message):
    """Used to fail in the middle of a PyTorch operation."""
    config = replace(tiny_llamagen("class").config, **size)
    with pytest.raises(t2i.UserError, match=message):
        load_backbone("llamagen", "gpt.pt", config=config)


def test_the_grid_of_a_renamed_file_is_an_option(tmp_path):
    """Used to be possible in Python only: a file such as 0300000.pt, which LlamaGen's own training
    writes, does not tell its grid.
    """
    own = tiny_llamagen("class")
    small = {"n_layer": own.config.n_layer, "n_head": own.config.n_head, "dim": own.config.dim}
    torch.save({"model": own.official_state_dict()}, tmp_path / "0300000.pt")
    torch.save({"model": tiny_vq().state_dict()}, tmp_path / "vq.pt")
    given = {"weights": str(tmp_path / "0300000.pt"), "tokenizer": str(tmp_path / "vq.pt")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", small)
        options = ModelOptions(base=BaseOptions("llamagen", **given))
        with pytest.raises(t2i.UserError, match=r"its grid is not .* --base\.grid HEIGHT WIDTH"):
            options.load(*options.check())
        options = replace(options, base=replace(options.base, grid=(4, 4)))
        wide = replace(options, base=replace(options.base, grid=(2, 8)))
        side = own.tokenizer.downsample
        assert wide.load(*wide.check()).backbone.image_size == (2 * side, 8 * side)
        model = options.load(*options.check())
        assert model.backbone.spec.grid == (4, 4)
        folder = t2i.save_pretrained(model, tmp_path / "ckpt", tuning="codec")
        assert t2i.from_pretrained(folder).backbone.spec.grid == (4, 4)
        twice = ModelOptions(ckpt=str(folder), base=BaseOptions(grid=(2, 8)))
        with pytest.raises(t2i.UserError, match=r"--base\.grid is for a published base"):
            twice.check()
        for grid in ((0, 4), (4, 10**12)):  # the latter used to overflow in PyTorch
            wrong = replace(options, base=replace(options.base, grid=grid))
            said = r"grid=\(\d, \d+\) must be at least 1 .* at most 1024"
            with pytest.raises(t2i.UserError, match=said):
                wrong.load(*wrong.check())


def test_the_precision_of_no_caption_encoder_is_refused(tmp_path):
    """It used to have no effect on such a model, without a word."""
    write_json(tmp_path / "config.json", {"family": "rar"})
    base = BaseOptions(weights=str(tmp_path), text_encoder_dtype="bfloat16")
    options = ModelOptions(base=base)
    with pytest.raises(t2i.UserError, match="has no effect with rar, which has no caption encoder"):
        options.load(*options.check())


def test_shards_of_a_family_that_publishes_one_file_load(tmp_path):
    """Weights that transformers or huggingface_hub split into shards load, and a checkpoint's hash
    of its base covers all shards.
    """
    backbone = tiny_rar()
    for name, module in {"rar": backbone.gpt, "vq": backbone.frozen.tokenizer}.items():
        (tmp_path / name).mkdir()
        save_torch_state_dict(module.state_dict(), tmp_path / name, max_shard_size="50KB")
    index, vq = (tmp_path / name / "model.safetensors.index.json" for name in ("rar", "vq"))
    loaded = load_backbone("rar", index, tokenizer=vq)
    assert_same_weights(loaded.gpt.state_dict(), backbone.gpt.state_dict())
    model = t2i.attach(loaded, t2i.presets.iclr2026(k=2))
    folder = t2i.save_pretrained(model, tmp_path / "checkpoint", tuning="codec")
    assert_same_weights(t2i.from_pretrained(folder).state_dict(), model.state_dict())
    shard = sorted(index.parent.glob("*.safetensors"))[-1]
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard)
    with pytest.raises(t2i.UserError, match="is not the weight file that the checkpoint"):
        t2i.from_pretrained(folder)
    shard.unlink()
    with pytest.raises(t2i.UserError, match=f"names {shard.name}, which is missing"):
        load_backbone("rar", index)


def test_links_to_files_named_by_a_hash_load(tmp_path):
    """The hub's cache and DVC have such links. Only the link's name tells the file's format and the
    model's shape, so it must be used and stored.
    """
    backbone, blobs, links = tiny_rar(), tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    links.mkdir()
    for name, module in {"rar": backbone.gpt, "vq": backbone.frozen.tokenizer}.items():
        torch.save(module.state_dict(), blobs / name)
        (links / f"{name}.bin").symlink_to(f"../blobs/{name}")
    given = {"tokenizer": links / "vq.bin"}
    loaded = load_backbone("rar", links / "rar.bin", **given)
    assert loaded.source.weights == str(links / "rar.bin")
    assert loaded.source.tokenizer == str(links / "vq.bin")
    assert loaded.source.config == asdict(loaded.config), "fine-tuned weights have another name"
    model = t2i.attach(loaded, t2i.presets.iclr2026(k=2))
    folder = t2i.save_pretrained(model, tmp_path / "checkpoint", tuning="codec")
    links = links.rename(tmp_path / "moved")
    moved = t2i.from_pretrained(folder, base=links)
    assert moved.backbone.source.weights == str(links / "rar.bin")
    options = ModelOptions(base=BaseOptions(family="rar", weights=str(links / "rar.bin")))
    assert options.name() == "rar"


def test_given_files_replace_those_of_a_backbone_folder(tmp_path):
    folder = write_tiny_base(tmp_path / "base")
    encoder = shutil.copytree(folder / "text_encoder", tmp_path / "mine")
    own = {k: v + 1 for k, v in torch.load(folder / "vq.pt").items()}
    torch.save(own, tmp_path / "mine.pt")
    loaded = load_backbone("llamagen", folder, tokenizer=tmp_path / "mine.pt", text_encoder=encoder)
    assert_same_weights(loaded.tokenizer.state_dict(), own)
    assert loaded.frozen.text_encoder.folder == encoder


def test_a_text_encoder_that_does_not_fit_is_refused(tmp_path):
    """It has another width, or the model reads no captions."""
    folder = write_tiny_base(tmp_path / "base")
    wide = t2i.load_backbone("llamagen", folder)
    config = replace(wide.config, caption_dim=2 * wide.config.caption_dim)
    other = LlamaGen(config)
    torch.save({"model": other.official_state_dict()}, tmp_path / "wide.pt")
    given = {"text_encoder": folder / "text_encoder"}
    with pytest.raises(
        t2i.UserError, match=r"produces features of width \d+, but .*wide\.pt needs"
    ):
        load_backbone("llamagen", tmp_path / "wide.pt", config=config, **given)
    classes = tiny_llamagen("class")
    torch.save({"model": classes.official_state_dict()}, tmp_path / "classes.pt")
    with pytest.raises(
        t2i.UserError, match=r"classes\.pt draws classes and does not read captions"
    ):
        load_backbone("llamagen", tmp_path / "classes.pt", config=classes.config, **given)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("method"), "method is None"),
        (lambda c: c.update(method=7), "is not a checkpoint's config.json: method is 7"),
        (lambda c: c["method"].update(k="4"), "k is '4', which is not of the type int"),
        (lambda c: c["method"].update(slot_weights=[]), "slot_weights"),
        (lambda c: c.update(tuning="most"), "tuning is 'most'"),
        (lambda c: c.pop("tuning"), "tuning is None"),
        (lambda c: c["backbone"].update(weights=None), "weights is None, which is not"),
        (lambda c: c["backbone"].pop("family"), "lacks family"),
        (lambda c: c["sampling"].update(cfg_scale=[]), "cfg_scale"),
        (lambda c: c["backbone"].update(family="mine"), "unknown backbone family 'mine'"),
    ],
)
def test_wrong_settings_of_a_checkpoint_are_named(plain, tmp_path, damage, message):
    """The config.json is incomplete, or was written by another program."""
    folder = shutil.copytree(plain, tmp_path / "copy", ignore=shutil.ignore_patterns("*.pt"))
    path = folder / "config.json"
    content = json.loads(path.read_text())
    damage(content)
    write_json(path, content)
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(t2i.UserError, match=message):
        t2i.from_pretrained(folder)


# -- case 25: a base alone, and runs that start from a checkpoint ----------------------------------
def test_load_model_takes_bases_checkpoints_and_runs(tiny_world, plain):
    base = load_model(tiny_world / "base")
    assert base.config.k == 1 and base.codec is None
    assert len(t2i.generate(base, PROMPTS[:1], progress=False)) == 1
    assert load_model("shapes").config.k == 1
    assert load_model(str(plain)).config.k == load_model(plain.parents[1]).config.k == 3
    low = load_model(plain, dtype="bfloat16")
    assert next(low.parameters()).dtype == torch.bfloat16
    assert is_checkpoint(plain.parents[1]) and not is_checkpoint(tiny_world / "base")
    assert [family_of(n) for n in ("shapes", "shapes-janus")] == ["llamagen", "janus"]
    file = tiny_world / "base" / "gpt.pt"
    for source, options, message in (
        (file, {}, "does not name its family: give one of llamagen"),
        (tiny_world / "base", {"base": file}, "is not a checkpoint"),
        ("nowhere", {}, "is not a file, a folder, a shipped base"),
        ("my models/x:gpt.pt", {"family": "rar"}, "the hub did not give gpt.pt of my models/x"),
        (tiny_world / "data", {}, "does not name its family"),
    ):
        with pytest.raises(t2i.UserError, match=message):
            load_model(source, **options)


@pytest.mark.parametrize(("old", "new"), [("lora", "lora"), ("full", "full")])
def test_a_run_starts_with_the_weights_of_another(tiny_world, tmp_path, old, new):
    """The other run's folder is not needed later, neither to load the new run nor to resume it."""
    lora = {"lora__rank": 2, "train_image_layers": True} if old == "lora" else {}
    first = tiny_run(tiny_world, f"{tmp_path.name}-old", batch_size=4, tuning=old, **lora)
    started_from = tmp_path / "old"
    shutil.copytree(train(first), started_from)
    config = tiny_run(
        tiny_world,
        f"{tmp_path.name}-new",
        tuning=new,
        backbone__weights=str(started_from),
        batch_size=4,
        steps=2,
        log__save_every=1,
    )
    before, model = t2i.from_pretrained(started_from), build_model(config)
    assert_same_weights(model.codec.state_dict(), before.codec.state_dict())
    drawn = [t2i.generate(m.eval(), PROMPTS, progress=False) for m in (before, model)]
    assert [i.tobytes() for i in drawn[0]] == [i.tobytes() for i in drawn[1]]
    whole = train(config)
    shutil.rmtree(started_from)
    again = t2i.from_pretrained(whole)
    assert again.backbone.source.weights == str((tiny_world / "base").resolve())
    assert len(t2i.generate(again, PROMPTS, progress=False)) == 2
    # Stopped after the first step and resumed without the old run: the same weights.
    shutil.rmtree(whole)
    resumed = train(replace(config, resume=True))
    assert_same_weights(t2i.from_pretrained(resumed).state_dict(), again.state_dict())
    assert weights(resumed).keys() >= {"backbone.safetensors:output.weight"}


def test_a_codec_with_other_settings_starts_fresh(tiny_world, plain, caplog):
    config = tiny_run(tiny_world, "-", backbone__weights=str(plain), method__k=2)
    with caplog.at_level("INFO"):
        model = build_model(config)
        build_model(replace(config, method=replace(config.method, k=3, residual="all")))
    assert model.config.k == 2 and "with a fresh codec" in caplog.text and "k 3 -> 2" in caplog.text
    assert "(residual first -> all)" in caplog.text


def test_a_run_from_a_codec_checkpoint_does_not_save_the_backbone(tiny_world, tmp_path):
    """The checkpoint's backbone is the base's own, so there is nothing to save."""
    old = train(tiny_run(tiny_world, f"{tmp_path.name}-codec", tuning="codec"))
    changes = {"tuning": "codec", "backbone__weights": str(old), "steps": 1}
    new = train(tiny_run(tiny_world, f"{tmp_path.name}-more", **changes))
    assert not (new / "backbone.safetensors").exists()


def test_runs_that_train_no_backbone_hand_on_changed_image_layers(tiny_world, tmp_path):
    options: dict = {"tuning": "codec", "steps": 1, "train_image_layers": True}
    runs = []
    for number in range(3):
        runs.append(train(tiny_run(tiny_world, f"{tmp_path.name}-{number}", **options)))
        options |= {"train_image_layers": False, "backbone__weights": str(runs[-1])}
    states = [t2i.from_pretrained(folder).backbone.state_dict() for folder in runs]
    assert_same_weights(states[0], states[1])
    assert_same_weights(states[0], states[2])


def test_adapters_are_merged_before_weights_are_rounded(tiny_world, tmp_path):
    old = train(tiny_run(tiny_world, f"{tmp_path.name}-lora", tuning="lora"))
    options = BackboneOptions(weights=str(old))
    exact = start_from(old, options).bfloat16().state_dict()
    assert_same_weights(start_from(old, options, dtype=torch.bfloat16).state_dict(), exact)


def test_the_options_of_sampling_are_the_checkpoints(tiny_world):
    model = build_model(tiny_run(tiny_world, "-", sampling__cfg_scale=3.5))
    assert (model.sampling.cfg_scale, model.sampling.top_k) == (3.5, 1000)


def test_a_generator_loads_without_its_tokenizer(tmp_path):
    """The missing tokenizer is an error only when images are drawn."""
    torch.save({"model": tiny_llamagen("class").official_state_dict()}, tmp_path / "gpt.pt")
    config = tiny_llamagen("class").config
    model = t2i.attach(
        load_backbone("llamagen", tmp_path / "gpt.pt", config=config), t2i.presets.base()
    )
    with pytest.raises(t2i.UserError, match="no image tokenizer; pass tokenizer=PATH"):
        t2i.generate(model, [1], progress=False)
    torch.save(tiny_vq().state_dict(), tmp_path / "vq.pt")
    whole = load_backbone(
        "llamagen", tmp_path / "gpt.pt", config=config, tokenizer=tmp_path / "vq.pt"
    )
    assert len(t2i.generate(t2i.attach(whole, t2i.presets.base()), [1], progress=False)) == 1
