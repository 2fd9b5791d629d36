"""The offline world of class-conditional models: its images, its exact score, and that its recipe
and programs can be killed and resumed.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import Killed, folder_content
from PIL import Image
from programs import ROOT, program, refused
from runs import SAME_SUM

from launch.lab import score_class_shapes
from launch.lab.score_class_shapes import row, verdicts_on
from t2i.checkpoint_folders import run_checkpoints
from t2i.data.order import split_indices
from t2i.data.sources.classes import LabelledFolder
from t2i.evaluation.draw import sample_labels
from t2i.models.rar.rar_recipes import recipes
from t2i.shapes import class_bases
from t2i.shapes.class_bases import make_class_base
from t2i.shapes.scenes import CLASSES, class_image
from t2i.shapes.tiny_recipes import ClassBase
from t2i.training.logs import read_metrics
from t2i.training.training_run import Run


def drawn(labels, size=32, first=0) -> np.ndarray:
    """A true image of each class id: uint8 [N, size, size, 3]."""
    return np.stack([np.asarray(class_image(c, first + i, size, 0)) for i, c in enumerate(labels)])


# -- the score -------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [24, 32, 64])
def test_true_images_are_right_and_others_are_not(size):
    labels = list(range(20))
    images = drawn(labels, size)
    assert verdicts_on(images, labels).all()
    other_color = [5 * (c // 5) + (c + 1) % 5 for c in labels]
    assert (verdicts_on(images, other_color) == [False, True, False]).all()
    other_shape = [(c + 5) % 20 for c in labels]
    assert (verdicts_on(images, other_shape) == [False, False, True]).all()


def test_no_object_and_two_objects_are_wrong():
    image = drawn([0], 64)[0]
    empty = np.broadcast_to(image[0, 0], image.shape)
    left, right = (np.asarray(Image.fromarray(image).resize((32, 64))) for _ in range(2))
    both = np.concatenate([left, right], axis=1)
    assert not verdicts_on(np.stack([empty, both]), [0, 0]).any()


def test_standard_errors_of_shares_and_of_paired_differences():
    first = np.zeros((100, 3), bool)
    second = first.copy()
    second[:20] = True
    assert row(second)["stderr"] == pytest.approx((0.2 * 0.8 / 100) ** 0.5)
    assert row(second, first)["minus_first"] == pytest.approx(0.2)
    assert row(second, second)["minus_first_stderr"] == 0


def write_samples(path, *, count=40, seed=0, classes=20, wrong=0):
    """Write true images like launch/sample_imagenet.py does; the first `wrong` of them show another
    class.
    """
    labels = sample_labels(count, 20, balanced=True, seed=seed).numpy()
    shown = labels.copy()
    shown[:wrong] = (shown[:wrong] + 1) % 20
    np.savez(path, arr_0=drawn(shown.tolist()))
    settings = {"count": count, "labels": "balanced", "seed": seed, "classes": classes}
    path.with_name(path.name + ".json").write_text(json.dumps(settings))
    return path


def test_files_are_scored_and_compared(tmp_path, capsys):
    a, b = write_samples(tmp_path / "a.npz", wrong=10), write_samples(tmp_path / "b.npz")
    out, sheet = tmp_path / "out" / "results.json", tmp_path / "sheet.png"
    program(score_class_shapes, a, b, "--out", out, "--sheet", sheet)
    scores = json.loads(out.read_text())["scores"]
    assert scores[str(a)]["right"] == 0.75 and scores[str(b)]["right"] == 1
    assert scores[str(b)]["minus_first"] == 0.25
    assert "| 40 | 0.750 ± 0.068 |" in capsys.readouterr().out
    assert Image.open(sheet).width > 20 * 48


def test_wrong_files_are_refused(tmp_path, capsys):
    a, seed = write_samples(tmp_path / "a.npz"), write_samples(tmp_path / "seed.npz", seed=1)
    plain = tmp_path / "plain.npz"
    np.savez(plain, arr_0=drawn([0]))
    photos = write_samples(tmp_path / "photos.npz", classes=1000)

    def message(*arguments):
        return refused(score_class_shapes, capsys, *arguments, "--out", tmp_path / "results.json")

    assert "is no .npz of launch/sample_imagenet.py" in message(plain)
    assert "is no .npz of launch/sample_imagenet.py" in message(tmp_path / "none.npz")
    assert "drawn for other classes" in message(a, seed)
    assert "has images of 1000 classes" in message(photos)
    assert "is no base of launch/lab/pretrain_class_shapes.py" in message(a, "--base", tmp_path)
    few = write_samples(tmp_path / "few.npz", count=19)
    assert "needs an image of every class" in message(few, "--sheet", tmp_path / "sheet.png")


# -- the recipe ------------------------------------------------------------------------------------
@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def tiny_recipe(out) -> ClassBase:
    shape = {"images_per_class": 4, "batch_size": 16, "dim": 32, "layers": 1, "image_size": 16}
    return ClassBase("rar", out=out, tokenizer_steps=2, steps=4, **shape)


def test_a_stopped_recipe_resumes(recipe, tmp_path, monkeypatch):
    """A request to stop leaves an unfinished base, which is not taken for the finished one."""
    plain_step, trained = Run.train_step, []

    def stop(run):
        run.stop_agreed = True
        metrics = plain_step(run)
        run.stop_agreed = True
        return metrics

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train_step", stop)
        make_class_base(recipe)
    run_dir = tmp_path / "rar-pretraining"
    assert [f.name for f in run_checkpoints(run_dir)] == ["step_000001"]

    def count(*arguments, **options):
        trained.append(arguments)
        raise Killed

    monkeypatch.setattr(class_bases, "train_tokenizer", count)
    base = make_class_base(recipe)
    assert (base / "config.json").exists() and not trained, "the tokenizer was finished"
    assert [f.name for f in run_checkpoints(run_dir)][-1] == "step_000004"
    assert make_class_base(recipe) == base


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("images_per_class", 0), ("image_size", 30)]
)
def test_impossible_recipes_write_nothing(recipe, tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option}={value} must be"):
        make_class_base(replace(recipe, **{option: value}))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_recipe_is_refused(recipe, tmp_path):
    make_class_base(recipe)
    with pytest.raises(ValueError, match=r"'steps': 4.*'steps': 5"):
        make_class_base(replace(recipe, steps=5))
    with pytest.raises(ValueError, match=r"images/recipe\.json"):
        make_class_base(replace(recipe, backbone="llamagen", image_size=24))
    assert len(LabelledFolder(tmp_path / "images").paths) == 4 * len(CLASSES)


def test_bases_do_not_train_on_what_fine_tuning_holds_out(recipe):
    config = class_bases.pretraining(ClassBase("rar"), recipe.out, recipe.out)
    tuning = recipes()["rar-shapes"][1]
    total = len(CLASSES) * ClassBase("rar").images_per_class
    seen, _ = split_indices(total, config.data.validation_samples, config.seed)
    _, held_out = split_indices(total, tuning.data.validation_samples, tuning.seed)
    assert not set(seen.tolist()) & set(held_out.tolist())


# -- processes -------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("program", ["sample_imagenet", "train_imagenet"])
def test_killed_programs_of_one_or_two_processes_leave_the_same_files(killed, program):
    whole, *others = (killed / f"{program}-{name}" for name in ("whole", "1", "2"))
    for folder in others:
        assert folder_content(folder) == folder_content(whole), "images, or the store of codes"
    kills = json.loads((killed / "kills.json").read_text())
    assert all(kills[folder.name] for folder in others), kills


@pytest.mark.slow
def test_one_or_two_processes_have_the_same_losses(killed):
    whole, *others = (read_metrics(killed / f"train_imagenet-{n}-run") for n in ("whole", "1", "2"))
    for rows in others:
        losses = [k for k in whole[-1] if k.startswith(("train/loss", "train/slot", "validation"))]
        assert len(losses) == 1 + 3 * 4
        for name in losses:
            assert rows[-1][name] == pytest.approx(whole[-1][name], rel=SAME_SUM), name


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The output of tests/killed_classes.py: what programs left that were killed and run again."""
    root = tmp_path_factory.mktemp("killed")
    base = make_class_base(tiny_recipe(root / "classes"))
    script = ROOT / "tests" / "killed_classes.py"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    alone = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, script, base, root],
        env=os.environ | alone | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root
