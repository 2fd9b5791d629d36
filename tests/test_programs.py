"""What all programs have in common: errors, help, choice of the model, output folders (cases 5, 7,
19, 25, 27, 28).
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from helpers import folder_content
from PIL import Image
from programs import ROOT, program, refused

from geneval import run as geneval_run
from launch import __main__ as commands
from launch import fid, generate, sample_imagenet
from t2i import cli
from t2i.checkpoint import load_model
from t2i.errors import UserError
from t2i.evaluation import draw
from t2i.evaluation.fid.image_sets import open_images
from t2i.evaluation.generation_folder import GENERATION_FILE, sample_file
from t2i.files import read_json, write_json
from t2i.imaging import save_png
from t2i.model_options import BaseOptions, ModelOptions
from t2i.models.llamagen.llamagen_model import SIZES
from t2i.ownership import owning


# -- errors ----------------------------------------------------------------------------------------
def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "bug",
    [
        lambda: list(zip([1], [], strict=True)),
        lambda: _raise(FloatingPointError("loss")),
        lambda: _raise(OSError(errno.EIO, "Input/output error")),
    ],
    ids=["zip", "float", "disk"],
)
def test_a_bug_keeps_its_traceback(bug):
    """Case 27."""
    with pytest.raises((ValueError, FloatingPointError, OSError)):
        cli.run(bug)


def test_a_users_mistake_ends_in_one_line(capsys):
    """Case 27."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: _raise(UserError("k=0 must be at least 1")))
    assert stopped.value.code == 1
    assert capsys.readouterr() == ("", "error: k=0 must be at least 1\n")


# -- help ------------------------------------------------------------------------------------------
_PLACES = ("launch/*.py", "launch/lab/*.py", "geneval/run.py", "dpg_bench/run.py")
_PROGRAMS = [
    str(path.relative_to(ROOT))
    for place in _PLACES
    for path in sorted(ROOT.glob(place))
    if 'if __name__ == "__main__":' in path.read_text()
]


def test_help_needs_no_torch():
    """Help answers at once, because nothing heavy is imported before the command line is parsed."""
    code = (
        "import runpy, sys, t2i\n"
        "assert not {'torch', 'numpy', 'tyro'} & sys.modules.keys(), 'the package itself'\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try: runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as stopped: assert not stopped.code, script\n"
        "    assert 'torch' not in sys.modules, script\n"
    )
    command = [sys.executable, "-c", code, *_PROGRAMS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(_PROGRAMS) >= 13
    for script in _PROGRAMS:
        examples = [
            line
            for line in (ROOT / script).read_text().split('"""')[1].splitlines()
            if line.startswith("python ") and not line.endswith("\\")
        ]
        assert all(f"\n  {line}\n" in done.stdout for line in examples), script


def test_one_command_for_all_programs(capsys, monkeypatch):
    """Its help lists every verb, a program's help shows the name of the command, and unknown verbs
    are refused.
    """
    text = _help(capsys, monkeypatch, commands.main, "--help")
    assert all(f"\n  {verb} " in text for verb in commands.VERBS)
    modules = {name.replace(".", "/") + ".py" for name, _ in commands.VERBS.values()}
    listed = {p for p in _PROGRAMS if not p.startswith("launch/lab/")}
    needs_a_clone = "launch/gpu_check.py"  # it reads the tests
    assert modules == listed - {"launch/__main__.py", needs_a_clone}
    launched = _help(capsys, monkeypatch, commands.main, "--local_rank=1", "fid", "--help")
    assert "usage: t2i fid " in launched and "--reference" in launched
    message = refused(commands, capsys, "genrate")
    assert "there is no t2i genrate; perhaps you meant generate; choose one of train-l" in message
    for name in [name for name in sys.modules if name.startswith(("launch.lab", "launch.ablate"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "launch.lab", None)  # as in a wheel
    assert "t2i ablate only runs in a clone" in refused(commands, capsys, "ablate")


@dataclass(frozen=True)
class _Inner:
    a: int = 1
    """First."""
    b: int = 2
    """Second."""


@dataclass(frozen=True)
class _Outer:
    """All."""

    needed: str
    """Needed."""
    inner: _Inner = field(default_factory=_Inner)
    c: int = 3
    """Third."""


def _help(capsys, monkeypatch, call, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["program.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def test_help_shows_the_main_options_and_how_to_see_the_rest(capsys, monkeypatch):
    text = "Does it.\n\npython program.py a \\\n    --b\ntorchrun program.py\n"

    def parse():
        return cli.parse(_Outer, text, main=("needed", "inner.b"))

    short = _help(capsys, monkeypatch, parse, "--help")
    assert "\n  python program.py a \\\n      --b\n  torchrun program.py\n" in short
    assert all(word in short for word in ("--needed", "--inner.b", "Second.", "--help-all"))
    assert not any(word in short for word in ("--inner.a", "--c INT"))
    everything = _help(capsys, monkeypatch, parse, "--help-all")
    assert all(word in everything for word in ("--needed", "--inner.a", "--inner.b", "--c INT"))
    monkeypatch.setattr(sys, "argv", ["program.py", "--needed", "x", "--inner.a", "5", "--c", "6"])
    assert parse() == _Outer("x", _Inner(5, 2), 6), (
        "options that the short help hides are still accepted"
    )


def test_help_of_a_recipe_shows_its_own_values(capsys, monkeypatch):
    recipes = {
        "one": ("the first", _Outer("x", _Inner(7))),
        "two": ("the second", _Outer("y")),
    }

    def parse():
        return cli.parse_recipe(recipes, "Trains.\n\npython p.py one", main=("inner.a",))

    short = _help(capsys, monkeypatch, parse, "one", "--help")
    assert "(default: 7)" in short and "--c INT" not in short and "--help-all" in short
    assert "--c INT" in _help(capsys, monkeypatch, parse, "one", "--help-all")
    names = _help(capsys, monkeypatch, parse, "--help")
    assert "the second" in names and "\n  python p.py one\n" in names and "RECIPE --help" in names


# -- which model -----------------------------------------------------------------------------------
def test_a_base_is_a_model(tiny_world):
    """Case 25: a backbone folder as --ckpt or as --base.weights, with or without its family."""
    folder = str(tiny_world / "base")
    for options in (
        ModelOptions(ckpt=folder),
        ModelOptions(base=BaseOptions(weights=folder)),
        ModelOptions(base=BaseOptions("llamagen", folder)),
    ):
        model = options.load(*options.check())
        assert model.config.k == 1 and options.checkpoint is None and options.name() == "base"
        assert options.about(model)["backbone"]["weights"] == folder


def test_a_checkpoint_is_a_model(plain):
    """Case 25."""
    options = ModelOptions(ckpt=str(plain))
    assert options.checkpoint is not None and options.name() == "plain-step_000003"
    assert options.load(*options.check()).config.k == 3


def test_the_chosen_checkpoint_stays_while_its_run_continues(plain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain, run / "checkpoints" / "step_000003")
    options = ModelOptions(ckpt=str(run))
    options.check()
    shutil.copytree(plain, run / "checkpoints" / "step_000004")
    assert options.name() == "run-step_000003"
    assert ModelOptions(ckpt=str(run)).name() == "run-step_000004"
    shutil.copytree(plain, run / "best")
    assert ModelOptions(ckpt=str(run / "best")).name() == "run-best"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ModelOptions(), "give --ckpt .* or --base.weights"),
        (ModelOptions(ckpt="shapez"), "shapez does not exist, .*shapes, shapes-janus"),
        (ModelOptions(ckpt="shapes", device="cuda"), "found no GPU"),
        (ModelOptions(base=BaseOptions(weights="none.pt")), "none.pt is not a file"),
        (ModelOptions(base=BaseOptions("rar", "none.bin")), "none.bin is not a file"),
        (ModelOptions(ckpt="shapes", base=BaseOptions(tokenizer="vq.pt")), "vq.pt is not a file"),
        (ModelOptions(ckpt="shapes", base=BaseOptions(weights="x.pt")), "leave out --base.weights"),
    ],
)
def test_unknown_models_are_refused(options, message):
    """Cases 25, 28: refused before anything is loaded."""
    with pytest.raises(UserError, match=message):
        options.check()


def test_missing_parts_are_named_as_options(tiny_world, monkeypatch):
    """Case 25: published weights come without tokenizer and text encoder."""
    options = ModelOptions(base=BaseOptions(weights=str(tiny_world / "base")))
    model = load_model(tiny_world / "base")
    monkeypatch.setattr("t2i.checkpoint.load_base", lambda *args, **given: model)
    model.backbone.frozen.text_encoder = None
    with pytest.raises(UserError, match=r"give --base\.text-encoder"):
        options.load("cpu", "float32")
    model.backbone.frozen.tokenizer = None
    with pytest.raises(UserError, match=r"give --base\.tokenizer"):
        options.load("cpu", "float32")


# -- one folder, one request -----------------------------------------------------------------------
@pytest.fixture
def draws(tiny_world, tmp_path, monkeypatch):
    """A function that runs `generate` in an empty working directory, on the tiny base if no --ckpt
    is given, and returns the folders in outputs/.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> list[Path]:
        ckpt = () if "--ckpt" in arguments else ("--ckpt", tiny_world / "base")
        program(generate, *ckpt, *arguments)
        return sorted(Path("outputs").glob("*"))

    return run


def test_every_request_has_its_own_folder(draws, plain, monkeypatch):
    """Case 19: requests do not mix, the same request again draws nothing, and more samples are
    added to those there are.
    """
    circle = ("--prompt", "a red circle", "--samples", 2)
    assert len(draws(*circle)) == 1
    folder = Path(draws(*circle, "--prompt-file", os.devnull)[0])
    assert folder.name.startswith("base-") and (folder / "grid.png").is_file()
    assert len(draws("--prompt", "two squares", "--samples", 2)) == 2
    assert len(draws(*circle, "--seed", 1)) == 3
    assert len(draws(*circle, "--top-k", 5)) == 4
    assert len(draws(*circle, "--ckpt", plain)) == 5
    drawn = folder_content(folder)
    with monkeypatch.context() as patch:
        patch.setattr(draw, "draw_images", None)
        assert len(draws(*circle)) == 5
    assert folder_content(folder) == drawn
    draws("--prompt", "a red circle", "--samples", 3)
    first, more = (drawn, folder_content(folder))
    assert len(list(folder.glob("*/samples/*.png"))) == 3
    assert all(more[name] == first[name] for name in first if "samples" in name)


def test_another_request_for_the_same_folder_is_refused(draws, plain, tiny_world, capsys):
    """Case 19: no image is drawn into a folder of another model, seed or prompt."""
    request = ("--prompt", "a red circle", "--samples", 2, "--out", "o")
    draws(*request)
    before = folder_content(Path("o"))

    def message(*arguments) -> str:
        return refused(generate, capsys, *request, *arguments)

    base = ("--ckpt", tiny_world / "base")
    assert "seed 0 there, 1 now" in message(*base, "--seed", 1)
    assert "sampling.top_k 1000 there, 5 now" in message(*base, "--top-k", 5)
    text = message("--ckpt", plain)
    assert f"{tiny_world / 'base'} there, {plain} now; weights.model" in text
    other = refused(generate, capsys, *base, "--prompt", "two squares", "--out", "o")
    assert "00000: 'a red circle' there, 'two squares' now" in other
    assert folder_content(Path("o")) == before
    record = Path("o", GENERATION_FILE)
    drawn = read_json(record)
    for name in ("model", "tokenizer", "text_encoder"):
        write_json(record, drawn | {"weights": drawn["weights"] | {name: "another"}})
        text = message(*base)
        assert f"weights.{name} 'another' there" in text and "None now" not in text
    for name in ("noise", "dtype", "method"):
        write_json(record, drawn | {name: "another"})
        assert f"{name} 'another' there" in message(*base)
    Path("mine/00000/samples").mkdir(parents=True)
    save_png(Image.new("RGB", (8, 8)), Path("mine") / sample_file(0, 0))
    assert "without generation.json" in refused(
        generate, capsys, *base, *request[:4], "--out", "mine"
    )


def test_images_of_another_grid_are_not_continued(tiny_world, tmp_path, monkeypatch, capsys):
    """A renamed weight file does not tell its grid. After a wrong one, the command with the right
    one used to end with the wrong images, and without a word; without --out, it was refused.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "tiny", {"n_layer": 2, "n_head": 2, "dim": 64})
    parts = {"weights": "gpt.pt", "tokenizer": "vq.pt", "text-encoder": "text_encoder"}
    files = [a for o, n in parts.items() for a in (f"--base.{o}", tiny_world / "base" / n)]
    request = ("--base.family", "llamagen", *files, "--prompt", "a red circle", "--samples", 1)
    to_o = (*request, "--out", "o")
    program(generate, *to_o, "--base.grid", 2, 8)
    text = refused(generate, capsys, *to_o, "--base.grid", 4, 4)
    assert "model.grid [2, 8] there, [4, 4] now" in text
    rounded = ("--base.grid", 2, 8, "--base.text-encoder-dtype", "bfloat16")
    other = refused(generate, capsys, *to_o, *rounded)
    assert "model.text_encoder_dtype 'float32' there, 'bfloat16' now" in other
    with monkeypatch.context() as patch:
        patch.setitem(SIZES, "tiny", {"n_layer": 2, "n_head": 4, "dim": 64})
        other = refused(generate, capsys, *to_o, "--base.grid", 2, 8)
    assert "model.heads 2 there, 4 now" in other
    record = Path("o", GENERATION_FILE)
    before = read_json(record)
    del before["model"]  # as earlier versions wrote it: their folders are continued
    write_json(record, before)
    program(generate, *to_o, "--base.grid", 2, 8)
    for more in (("--base.grid", 2, 8), ("--base.grid", 4, 4), rounded):
        program(generate, *request, *more)
    assert len([*Path("outputs").glob("gpt-2x8-*")]) == 2
    assert len([*Path("outputs").glob("gpt-4x4-*")]) == 1


def test_a_folder_knows_its_grid(draws, tiny_world, capsys):
    """Another one was used instead of it, silently."""
    request = ("--prompt", "a red circle", "--samples", 1, "--base.grid")
    said = refused(generate, capsys, "--ckpt", tiny_world / "base", *request, 2, 8)
    assert "grid=(2, 8) is given, but" in said and "base/config.json says [4, 4]" in said
    assert not Path("outputs").exists(), "an empty folder was left"
    draws(*request, 4, 4)


def test_stages_are_added_to_a_folder(draws, plain):
    """Case 19: the sheet of stages shows this request, and the images stay."""
    request = ("--ckpt", plain, "--prompt", "a red circle", "--samples", 1)
    folder = draws(*request)[0]
    drawn = (folder / sample_file(0, 0)).read_bytes()
    assert draws(*request, "--stages") == [folder]
    assert len(list(folder.glob("00000/stages/*.png"))) == 3 and (folder / "stages.png").is_file()
    assert (folder / sample_file(0, 0)).read_bytes() == drawn


def test_several_generations_are_not_scored_as_one(tmp_path):
    """Case 19: FID refuses a folder that holds the images of two models."""
    for name in ("a", "b"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / name / sample_file(0, 0))
        write_json(tmp_path / name / GENERATION_FILE, {})
    assert open_images(tmp_path / "a").count == 1
    with pytest.raises(UserError, match=r"holds 2 sets of generated images \(a, b"):
        open_images(tmp_path)


# -- output folders and files ----------------------------------------------------------------------
def test_a_folder_in_use_is_refused_at_once(tiny_world, tmp_path, capsys):
    """Case 5: the message names the process, before a model or a judge is loaded."""
    ckpt, mine = ("--ckpt", tiny_world / "base"), f"in use by process {os.getpid()}"
    place = ("--out", tmp_path / "out")
    with owning(tmp_path / "out", "folder"):
        assert mine in refused(generate, capsys, *ckpt, "--prompt", "x", *place)
        shapes = ("--prompts", "shapes")
        assert mine in refused(geneval_run, capsys, *ckpt, *shapes, *place)
        assert mine in refused(sample_imagenet, capsys, *ckpt, *place)
    with owning(tmp_path, "image set", "a.npz"):
        text = refused(sample_imagenet, capsys, *ckpt, "--out", tmp_path / "a.npz")
        assert f"image set {tmp_path / 'a.npz'} is {mine}" in text
        text = refused(sample_imagenet, capsys, *ckpt, "--out", tmp_path / "b.npz")
        assert "draws from captions, not classes" in text, "a file next to it is not in use"


def test_the_output_is_checked_before_the_work(tiny_world, tmp_path, capsys, monkeypatch):
    """Case 7 and similar ones: `fid.py --out FOLDER` used to compute everything first."""
    monkeypatch.setattr("t2i.checkpoint.load_base", None)
    monkeypatch.setattr("t2i.evaluation.fid.inception.load_inception", None)
    (file := tmp_path / "file").touch()
    ckpt = ("--ckpt", tiny_world / "base")
    for out in (file, file / "below"):
        text = refused(generate, capsys, *ckpt, "--prompt", "x", "--out", out)
        assert f"cannot write to {out}" in text
        assert f"cannot write to {out}" in refused(geneval_run, capsys, *ckpt, "--out", out)
        assert f"cannot write to {out}" in refused(sample_imagenet, capsys, *ckpt, "--out", out)
    (tmp_path / "folder.npz").mkdir()
    text = refused(sample_imagenet, capsys, *ckpt, "--out", tmp_path / "folder.npz")
    assert "folder.npz: it is a folder" in text
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    sets = ("--samples", tmp_path / "images.npz", "--reference", tmp_path / "images.npz")
    text = refused(fid, capsys, *sets, "--allow-fewer", "--out", tmp_path)
    assert f"{tmp_path}: it is a folder; give the name of a file" in text


def test_impossible_options_are_refused_before_the_model_is_loaded(tiny_world, capsys, monkeypatch):
    """A mistake that is cheap to find costs no waiting."""
    monkeypatch.setattr("t2i.checkpoint.load_base", None)
    ckpt = ("--ckpt", tiny_world / "base", "--out", tiny_world / "nothing")
    drawing = ((generate, ("--prompt", "x")), (geneval_run, ()), (sample_imagenet, ()))
    for module, own in drawing:
        assert "cfg_scale=0.5" in refused(module, capsys, *ckpt, *own, "--cfg-scale", 0.5)
        assert "found no GPU" in refused(module, capsys, *ckpt, *own, "--device", "cuda")
    assert "count=0" in refused(sample_imagenet, capsys, *ckpt, "--count", 0)
    assert not (tiny_world / "nothing").exists()


def test_drawing_continues_after_a_full_disk(draws, capsys, monkeypatch, tiny_world):
    """Case 7: a full disk ends in one line, and the same command later draws the rest."""
    request = ("--prompt", "a red circle", "--samples", 4, "--out", "o")
    save, saved = Image.Image.save, count()

    def full(image, path, **options):
        if ".png." in str(path) and next(saved) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(image, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        text = refused(generate, capsys, "--ckpt", tiny_world / "base", *request)
    assert "no space is left on the disk" in text
    kept = {p: p.stat().st_mtime_ns for p in Path("o").glob("*/samples/*.png")}
    assert len(kept) == 2 and not list(Path("o").rglob("*.tmp"))
    draws(*request)
    assert len(list(Path("o").glob("*/samples/*.png"))) == 4
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_temporary_files_of_a_killed_process_are_removed(draws):
    """Case 5: the owner of a folder may remove half-written files."""
    request = ("--prompt", "a red circle", "--samples", 1, "--out", "o")
    draws(*request)
    (left := Path("o/00000/samples/00000.png.0123abcd.tmp")).touch()
    draws(*request)
    assert not left.exists() and json.loads(Path("o/generation.json").read_text())["seed"] == 0
