"""Class-conditional models of every family, offline: from images by class to a base, TensorAR, a
resumed run, sampled images (8 instead of 50,000) and FID.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Killed, in_threads, rare, tiny_llamagen, tiny_rar
from PIL import Image
from programs import refused
from runs import assert_same_weights, before_step, kill, weights

import t2i
from launch import fid as fid_program
from launch import sample_imagenet, train_imagenet
from t2i import cli
from t2i.errors import UserError
from t2i.evaluation.draw import draw_classes, sample_labels
from t2i.evaluation.evaluation_options import ClassImages
from t2i.models.llamagen.llamagen_recipes import class_recipes
from t2i.models.open_magvit2 import open_magvit2_recipes
from t2i.models.rar import rar_recipes
from t2i.processes import ALONE, Processes
from t2i.rng import integers, make_keys
from t2i.sampling import DrawOptions
from t2i.shapes.class_bases import make_class_base
from t2i.shapes.tiny_recipes import ClassBase
from t2i.training.batches import TrainingData
from t2i.training.check import check
from t2i.training.config import DataOptions, LabelledOptions, TrainConfig
from t2i.training.examples import check_backbone, encode_examples
from t2i.training.logs import read_metrics
from t2i.training.loop import train
from t2i.training.validation import validate

FAMILIES = (rare("llamagen"), rare("open_magvit2"), "rar")
RECIPES = class_recipes() | open_magvit2_recipes.recipes() | rar_recipes.recipes()


def call(monkeypatch, program, *arguments):
    """Run a script's main with these arguments."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    return program.main()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("classes")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, world):
    """A tiny base of 20 classes, trained for 8 steps."""
    recipe = ClassBase(
        request.param,
        out=world,
        images_per_class=4,
        tokenizer_steps=4,
        steps=8,
        batch_size=16,
        dim=32,
        layers=2,
    )
    return make_class_base(recipe)


def shapes_recipe(base: Path) -> str:
    """The name of the offline world's recipe for this base."""
    return f"{base.name.replace('_', '-')}-shapes"


def tiny(base: Path, run: str, **changes) -> TrainConfig:
    """The offline world's recipe for this base, shortened to 8 steps."""
    config = RECIPES[shapes_recipe(base)][1]
    config = replace(
        config,
        run_dir=base.parent / f"{base.name}-{run}",
        backbone=replace(config.backbone, weights=str(base)),
        data=replace(
            config.data,
            source=(str(base.parent / "images"),),
            cache_dir=base.parent / "cache",
            validation_samples=16,
        ),
        optim=replace(config.optim, backbone_lr=1e-3, warmup_steps=0),
        engine=replace(config.engine, micro_batch=16),
        log=replace(config.log, save_every=4, sample_every=0, validate_every=0, log_every=1),
        batch_size=16,
        steps=8,
    )
    return replace(config, **changes)


def test_train_resume_sample(base, world, tmp_path, monkeypatch):
    config = tiny(base, "run")
    whole = train(config)
    start = t2i.attach(t2i.load_backbone(base.name, base), config.method)
    before = validate(start, TrainingData(config, start.backbone, ALONE))
    after = read_metrics(config.run_dir)[-1]
    for kind, losses in (("noised_truth", before.noised_truth), ("own_drafts", before.own_drafts)):
        assert after[f"validation/{kind}/slot0"] < losses[0] - 0.02

    with before_step(6, kill), pytest.raises(Killed):
        train(tiny(base, "halves"))
    resumed = train(tiny(base, "halves", resume=True))
    assert_same_weights(weights(whole), weights(resumed))

    options = ("--ckpt", config.run_dir, "--count", 8, "--batch-size", 3, "--device", "cpu")
    out = tmp_path / "samples.npz"
    call(monkeypatch, sample_imagenet, *options, "--out", out)
    with np.load(out) as arrays:
        images = arrays["arr_0"]
    assert images.shape == (8, 24, 24, 3) and images.std() > 0
    assert len(np.unique(images, axis=0)) == 8, "every image has its own random numbers"

    out = tmp_path / "samples"
    call(monkeypatch, sample_imagenet, *options, "--out", out)
    (left := out / "000001.png.0123abcd.tmp").touch()  # as by a kill
    call(monkeypatch, sample_imagenet, *options, "--out", out)
    assert not left.exists() and len(list(out.glob("*.png"))) == 8


@pytest.mark.slow
def test_the_fid_program_runs_the_full_size_network(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(8, 24, 24, 3), dtype=np.uint8)
    samples, reference, result = (tmp_path / n for n in ("samples.npz", "ref.npz", "fid.json"))
    np.savez(samples, arr_0=images)
    np.savez(reference, arr_0=images[::-1][:6] // 2)
    given = ("--samples", samples, "--reference", reference, "--out", result, "--allow-fewer")
    call(monkeypatch, fid_program, *given, "--inception-weights", "random", "--device", "cpu")
    assert result.exists()


# -- sampling --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    return t2i.attach(tiny_rar(), t2i.presets.iclr2026())


def draw_all(model, out, rank=0, world_size=1, **changes):
    options = DrawOptions(**{"batch_size": 2, **changes})
    processes = Processes(rank, world_size, patience=60)
    return draw_classes(model, out, ClassImages(7), options, processes, progress=False)


@pytest.mark.parametrize("name", ["a.npz", "folder"])
def test_killed_and_shared_sampling_give_the_same_files(model, tmp_path, monkeypatch, name):
    def content(out):
        files = [out] if out.is_file() else sorted(out.glob("*.png"))
        return [path.read_bytes() for path in files]

    whole = content(draw_all(model, tmp_path / "whole" / name))
    decode, count = type(model.backbone).decode_images, []

    def die(self, codes, size=None):
        count.append(len(codes))
        if len(count) == 3:
            raise Killed
        return decode(self, codes, size)

    killed = tmp_path / "killed" / name
    with monkeypatch.context() as patch:
        patch.setattr(type(model.backbone), "decode_images", die)
        with pytest.raises(Killed):
            draw_all(model, killed)
        assert content(draw_all(model, killed)) == whole
    assert sum(count) == 7 + 2, "only the batch that was killed is drawn again"

    shared = tmp_path / "shared" / name
    in_threads(lambda rank: draw_all(model, shared, rank, 2))
    assert content(shared) == whole
    with pytest.raises(ValueError, match="seed 0 there, 1 now"):
        draw_all(model, shared, seed=1)


def test_classes_and_codes_come_from_different_streams(model, tmp_path, monkeypatch):
    """If they came from one stream, the first code of an image would depend on its class's draw."""
    keys = []

    def spy(model, prepared, image_keys, *_):
        keys.append(image_keys)
        raise Killed

    monkeypatch.setattr("t2i.generation.sample_windows", spy)
    with pytest.raises(Killed):
        draw_classes(model, tmp_path / "a", ClassImages(40, "random"), DrawOptions(batch_size=40))
    labels = sample_labels(40, 10, balanced=False, seed=0)
    assert torch.equal(integers(make_keys(0, torch.arange(40)), 10, 1)[:, 0], labels)
    assert not torch.equal(integers(keys[0], 10, 1)[:, 0], labels)
    assert len(set(keys[0].tolist())) == 40


def test_images_are_resized_before_they_are_clamped():
    backbone = tiny_llamagen("class")
    codes = torch.randint(48, (2, 16, 1), generator=torch.Generator().manual_seed(0))
    raw = 3 * backbone.tokenizer.decode(codes.view(2, 4, 4))
    backbone.tokenizer.decode = lambda codes: raw
    assert raw.abs().max() > 1, "otherwise clamping has no effect"
    small = F.interpolate(raw, size=(5, 5), mode="bicubic")
    expected = (127.5 * small + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(backbone.decode_images(codes, (5, 5)), expected)
    clamped_first = F.interpolate(raw.clamp(-1, 1), size=(5, 5), mode="bicubic")
    late = (127.5 * clamped_first + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert not torch.equal(late, expected)
    assert backbone.decode_images(codes).shape == (2, 8, 8, 3)


# -- settings and mistakes -------------------------------------------------------------------------
def test_recipes_of_all_published_sizes():
    published = {name: config for name, (_, config) in RECIPES.items() if "shapes" not in name}
    names = {name for name in published if published[name].method == t2i.presets.tuned()}
    assert names == {
        *(f"llamagen-{size}" for size in ("b-256", "b-384", "l-256", "l-384")),
        *(f"llamagen-{size}-384" for size in ("xl", "xxl", "3b")),
        *(f"open-magvit2-{size}" for size in ("b", "l", "xl")),
        *(f"rar-{size}" for size in ("b", "l", "xl", "xxl")),
    }
    assert len(published) == 4 * len(names)
    for config in published.values():
        assert (config.batch_size, config.epochs, config.condition_dropout) == (256, 20, 0.1)
        assert config.optim.weight_decay == 0.05 and config.token_dropout == 0.1
    assert "c2i_XL_384.pt" in published["llamagen-xl-384"].backbone.weights
    assert "c2i_L_256.pt" in published["llamagen-l-256"].backbone.weights
    assert "AR_256_B.ckpt" in published["open-magvit2-b"].backbone.weights


def test_the_views_are_those_of_the_options(base, tmp_path):
    config = tiny(base, "-")
    own = {"views": "ten-crop", "crop_ranges": (1.2,), "cache_dir": tmp_path}
    config = replace(config, data=replace(config.data, **own))
    store = encode_examples(config, t2i.load_backbone(base.name, base), ALONE)
    assert store.manifest["key"]["images"]["views"] == {"kind": "ten-crop", "crop_ranges": [1.2]}


def test_the_preflight_check_opens_images_of_classes(base, tmp_path):
    """Used to open none of them, and so to miss broken ones."""
    for i in range(20):
        (tmp_path / "images" / f"c{i:02d}").mkdir(parents=True)
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "images" / f"c{i:02d}" / "0.png")
    config = tiny(base, "looked")
    data = replace(config.data, source=(str(tmp_path / "images"),), validation_samples=2)
    config = replace(config, data=data)
    assert "checked       20 of them: nothing skipped" in check(config)
    (tmp_path / "images" / "c03" / "0.png").write_bytes(b"junk")
    (tmp_path / "images" / "c04" / "z.png").symlink_to("/gone")
    said = check(config)
    assert "1 of 20 checked samples are skipped, corrupt (c03/0.png)" in said
    assert "1 left out, broken link (c04/z.png)" in said and "2 of 19 samples held out" in said
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"can be used: 21 corrupt .*; the first says: none of"):
        check(config)


def test_command_line(monkeypatch):
    arguments = "rar-b-arxiv2505 --data.source a b --optim.codec-lr 0.5"
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *arguments.split()])
    config = cli.parse_recipe(RECIPES, train_imagenet.__doc__)
    assert config.data == LabelledOptions(source=("a", "b"), crop_ranges=(1.1,))
    assert config.optim.codec_lr == 0.5 and config.method == t2i.presets.arxiv2505()
    assert config.backbone.weights == "yucornetto/RAR:rar_b.bin"


def test_wrong_data_is_refused(base):
    config = tiny(base, "wrong")
    report = check(config)
    assert "80 images of 20 classes" in report and "2 views of each" in report

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            train(replace(config, data=replace(config.data, **changes)))

    refused("no data: give --data.source", source=())
    refused("19 classes, but this", source=(str(_nineteen_classes(base.parent)),))
    refused("may name several places", source=("a", "b"))
    with pytest.raises(ValueError, match=r"--log.prompts 20: class label 20 .* give others"):
        train(replace(config, log=replace(config.log, prompts=("20",))))
    with pytest.raises(ValueError, match="training on captions needs"):
        train(replace(config, data=DataOptions(source="shapes")))
    with pytest.raises(ValueError, match="cannot be trained on classes"):
        check_backbone(tiny_llamagen("text"), config.data)


def test_mistakes_end_in_one_line(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    name = shapes_recipe(base)
    given = (name, "--backbone.weights", base)
    train_error = partial(refused, train_imagenet, capsys)
    assert "choose one of llamagen-b-256, " in train_error(f"{base.name}-huge")
    older = train_error("--backbone", base.name, "--size", "shapes", "--data.source", "none")
    assert "name a recipe first, then its options; train_imagenet.py --help" in older
    missing = train_error(name)
    assert f"python launch/lab/pretrain_class_shapes.py --backbone {base.name}" in missing
    assert "none is neither a folder nor a file" in train_error(*given, "--data.source", "none")
    assert "data.split='/' must be the name of a sub-folder" in train_error(
        *given, "--data.split", "/"
    )
    assert "has no sub-folders" in train_error(*given, "--data.source", "empty")
    few = train_error(*given, "--data.source", _nineteen_classes(base.parent))
    assert "has 19 classes, but this" in few

    sample_error = partial(refused, sample_imagenet, capsys, "--out", "out.npz")
    assert "checkpoint folder none does not exist" in sample_error("--ckpt", "none")
    assert "is not a complete checkpoint folder" in sample_error("--ckpt", "empty")
    assert "no model: give --ckpt" in sample_error()
    published = ("--base.family", base.name, "--base.weights")
    assert "none.bin is not a file" in sample_error(*published, "none.bin")
    assert "count=0" in sample_error(*published, base, "--count", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"], "nothing is written"


def _nineteen_classes(world: Path) -> Path:
    folder = world / "nineteen"
    for kind in sorted((world / "images" / "train").iterdir())[1:]:
        (folder / kind.name).mkdir(parents=True, exist_ok=True)
        picture = next(kind.iterdir())
        (folder / kind.name / picture.name).write_bytes(picture.read_bytes())
    return folder
