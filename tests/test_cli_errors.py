"""A user's mistake ends in one clear message and a non-zero exit code, without a traceback and
without leaving files.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llamagen, tiny_vq
from PIL import Image

from launch import generate, train_llamagen
from t2i import cli
from t2i.errors import UserError
from t2i.evaluation.prompt_files import read_prompts
from t2i.fields import from_json
from t2i.sampling import SamplingConfig
from t2i.training.config import EngineOptions, TrainConfig
from t2i.training.engine import deepspeed_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """A function that runs a script with arguments that it must refuse, and returns its message.
    Asserts that it prints nothing else and writes nothing.
    """

    def run(script, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            cli.run(script.main)
        assert stopped.value.code in (1, 2)
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        lines = re.split(r"[\r\n]+", captured.err)
        text = " ".join(line for line in lines if not line.startswith("codes:"))  # a progress bar
        message = re.sub(r"[\s│╭╮╰╯─]+", " ", text).strip()
        assert message.startswith(("error: ", "Value error", "Unrecognized", "Invalid", "Missing"))
        assert message.count("error: ") <= 1
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return message

    return run


@pytest.fixture
def train_fails(tiny_world, tmp_path, fails):
    """`fails` for the trainer on the tiny world, with further options."""

    def run(*arguments, recipe: str = "shapes-iclr2026") -> str:
        defaults = {
            "--backbone.weights": tiny_world / "base",
            "--data.source": tiny_world / "data",
            "--data.validation-samples": 9,
            "--data.cache-dir": tiny_world / "cache",
            "--run-dir": tmp_path / "run",
            "--batch-size": 8,
            "--engine.micro-batch": 4,
            "--steps": 1,
        }
        flags = [a for a in arguments if str(a).startswith("--")]
        kept = [x for k, v in defaults.items() if k not in flags for x in (k, v)]
        return fails(train_llamagen, recipe, *kept, *arguments)

    return run


# -- training --------------------------------------------------------------------------------------
def test_missing_data_is_named(train_fails, tmp_path):
    folder = tmp_path / "nothing"
    said = train_fails("--data.source", "a" * 5000)
    assert "File name too long: aaa" in said or "aaa does not exist" in said  # Python 3.14
    assert f"{folder} does not exist" in train_fails("--data.source", folder)
    assert "--data.source has an empty value" in train_fails("--data.source", "")


def test_images_without_captions_are_refused(train_fails, tmp_path):
    (data := tmp_path / "data").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32)).save(data / f"{i}.png")
    message = train_fails("--data.source", data)
    assert f"{data} holds 3 images but no captions" in message and "metadata.jsonl" in message
    (data / "0.png.txt").write_text("a circle")
    message = train_fails("--data.source", data)
    assert "0.png.txt is not read; its caption belongs in 0.txt" in message


def test_too_little_data_is_refused(train_fails):
    message = train_fails("--data.validation-samples", 60)
    assert "data.validation_samples=60" in message and "fewer than the 60 usable samples" in message


def test_unknown_names_are_refused_with_alternatives(train_fails):
    message = train_fails(recipe="shapes-iclr2027")
    assert "perhaps you meant shapes-iclr2026; choose one of shapes-tuned," in message
    message = train_fails("--optim.codec-lrr", 1)
    assert "--optim.codec-lrr" in message and "Perhaps you meant: --optim.codec-lr " in message
    message = train_fails("--method.noise", "loud")
    assert "'loud'" in message and "'categorical', 'codebook', 'gaussian'" in message
    message = train_fails("--backbone.family", "lamagen")
    assert "perhaps you meant llamagen; choose one of llamagen" in message


def test_a_recipe_of_another_program_is_refused(train_fails):
    for name, program in (("janus-pro-1b-lora", "train_janus"), ("rar-b", "train_imagenet")):
        message = train_fails(recipe=name)
        assert f"error: {name} is a recipe of launch/{program}.py" in message


def test_sampling_options_are_checked_before_training(train_fails):
    assert "stride=9" in train_fails("--sampling.stride", 9, "--check")
    assert "window=9" in train_fails("--sampling.window", 9, "--check")
    two = train_fails("--sampling.temperature", 1, 0.5)
    assert "must be one number, or one for each of the 1 sub-token" in two


def test_bad_training_options_are_refused(train_fails):
    assert "k=17 must be between 1 and the 16 tokens of an image" in train_fails("--method.k", 17)
    assert "slot_weights=(0.0,)" in train_fails("--method.slot-weights", 0)
    assert "batch_size=6 must be a multiple of engine.micro_batch=4" in train_fails(
        "--batch-size", 6
    )
    assert "bf16 needs engine.zero_stage >= 1" in train_fails("--engine.precision", "bf16")
    assert "steps=0 must be at least 1" in train_fails("--steps", 0)
    assert "log.prompts has an empty prompt" in train_fails("--log.prompts", " ")
    assert "nothing to train" in train_fails("--method.k", 1, "--tuning", "codec")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--optim.backbone-lr", "nan", "optim.backbone_lr=nan must be a number from 0 to 1e+12"),
        ("--optim.codec-lr", "inf", "optim.codec_lr=inf must be a number"),
        ("--optim.weight-decay", "-1", "optim.weight_decay=-1.0 must be a number"),
        ("--optim.grad-clip", "nan", "optim.grad_clip=nan must be at least 1e-12"),
        ("--optim.betas", "0.9 1.5", "optim.betas=(0.9, 1.5) must be two numbers in [0, 1)"),
        ("--epochs", "nan", "epochs=nan must be a number above 0"),
        ("--log.save-every", "-1", "log.save_every=-1 must be a number of steps, or 0"),
        ("--lora.alpha", "1e400", "lora.alpha=inf must be a number above 0"),
        ("--optim.codec-lr", "1e300", "must be a number from 0 to 1e+12"),
        ("--optim.grad-clip", "1e-300", "optim.grad_clip=1e-300 must be at least 1e-12"),
        ("--batch-size", str(2**40), f"batch_size={2**40} must be at most 1,048,576"),
        ("--steps", str(10**30), f"steps={10**30} must be at most 1,000,000,000"),
        ("--epochs", "1e300", "epochs=1e+300 must be a number above 0"),
        ("--lora.rank", str(10**9), f"lora.rank={10**9} must be at least 1 and at most 4096"),
        ("--method.slot-weights", "1 inf", "slot_weights=(1.0, inf): give one or more weights"),
        (
            "--method.slot-weights",
            "1e300",
            "slot_weights=(1e+300,): give one or more weights from 0 to",
        ),
        ("--method.slot-weights", "1e-300", "slot 0's at least 1e-12"),
        ("--method.depth", str(10**9), f"depth={10**9} must be from 1 to 100"),
        ("--seed", str(2**63), f"seed={2**63} must be between 0 and 2**63 - 1"),
    ],
)
def test_numbers_out_of_range_are_refused(train_fails, option, value, message):
    """Case 2: numbers that can only lead to NaN weights or an impossible run are refused before
    anything is loaded.
    """
    assert message in train_fails(option, *value.split())


def test_empty_values_are_refused(train_fails, generate_fails):
    """For example --run-dir "$RUN" if RUN is not set: the run used to be written into the working
    directory.
    """
    for nothing in ("", " ", "\n"):
        assert "--run-dir has an empty value: leave the option out" in train_fails(
            "--run-dir", nothing
        )
        assert "--run_dir has an empty value" in train_fails(f"--run_dir={nothing}")
        assert "--out has an empty value" in generate_fails("--prompt", "a", "--out", nothing)
    assert "--steps has an empty value" in train_fails("--steps", "")
    assert "--method.slot-weights has an empty value" in train_fails("--method.slot-weights", 1, "")


def test_a_run_folder_within_the_data_is_refused(train_fails, tiny_world):
    """The run's sheets used to become data, and then it could not be resumed because the data had
    changed.
    """
    for inside in (tiny_world / "data", tiny_world / "data" / "runs" / "a"):
        message = train_fails("--run-dir", inside, "--check")
        assert "so its sheets would be read as data: give a --run-dir elsewhere" in message
    train_fails("--run-dir", tiny_world / "data-2", "--data.source", "none")  # not within the data


def test_a_tilde_after_an_equals_sign_is_expanded(train_fails, tmp_path, monkeypatch):
    """A shell does not expand it there, so a folder named "~" used to be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/mine does not exist" in train_fails("--data.source=~/mine")
    assert "~nobody/mine does not exist" in train_fails("--data.source=~nobody/mine")


def test_a_batch_that_cannot_be_split_is_refused():
    config = TrainConfig(batch_size=16, engine=EngineOptions(micro_batch=4))
    with pytest.raises(ValueError, match=r"cannot be split over 3 processes.* multiple of 12$"):
        deepspeed_config(config, world_size=3)
    with pytest.raises(ValueError, match=r"multiple of 32, or engine\.micro_batch=2$"):
        deepspeed_config(config, world_size=8)


def test_bad_deepspeed_configs_are_refused(train_fails, tmp_path):
    path = tmp_path / "deepspeed.json"

    def message(content: str) -> str:
        path.write_text(content)
        return train_fails("--engine.deepspeed-config", path)

    derived = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {},
    }
    text = message(json.dumps(derived))
    assert "sets gradient_clipping, train_micro_batch_size_per_gpu; only zero_optimization" in text
    assert "is for ZeRO stage 2, but engine.zero_stage is 0" in message(
        '{"zero_optimization": {"stage": 2}}'
    )
    assert "must hold" in message("[1]")
    assert "is damaged or not JSON" in message("{")
    assert "overlap_com" in message('{"zero_optimization": {"overlap_com": true}}')


def test_bad_weights_are_refused(train_fails, tiny_world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_world / "base", base)
    os.truncate(base / "gpt.pt", 5000)
    assert f"{base / 'gpt.pt'} cannot be read: it is truncated" in train_fails(
        "--backbone.weights", base
    )
    shutil.copy(base / "vq.pt", base / "gpt.pt")
    assert "missing" in (message := train_fails("--backbone.weights", base))
    assert "tok_embeddings.weight" in message and "encoder.conv_in.weight" in message
    message = train_fails("--backbone.weights", base / "vq.pt")
    assert "not a LlamaGen GPT: key 'tok_embeddings.weight' is missing" in message
    (base / "config.json").unlink()
    assert "is not a backbone folder" in train_fails("--backbone.weights", base)
    assert "shapes" in train_fails("--backbone.weights", tmp_path / "nowhere.pt")


def test_a_backbone_that_reads_no_captions_is_refused(train_fails, tiny_world, tmp_path):
    backbone = tiny_llamagen("class")
    torch.save({"model": backbone.official_state_dict()}, tmp_path / "gpt.pt")
    config = {"family": "llamagen", "weights": "gpt.pt", "config": vars(backbone.config)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "has no image tokenizer" in train_fails("--backbone.weights", tmp_path)
    torch.save({"model": tiny_vq().state_dict()}, vq := tmp_path / "vq.pt")
    message = train_fails("--backbone.weights", tmp_path, "--backbone.tokenizer", vq)
    assert "needs a text-to-image backbone with its text encoder" in message
    vq = tiny_world / "base" / "vq.pt"
    message = train_fails("--backbone.weights", tmp_path, "--backbone.tokenizer", vq)
    assert "tokenizer has 64 codes, but the llamagen backbone has 48" in message


def test_check_refuses_what_training_would_refuse(train_fails):
    assert "k=17 must be between" in train_fails("--method.k", 17, "--check")
    assert "leave none to train on" in train_fails("--data.validation-samples", 60, "--check")
    assert "nothing to train" in train_fails("--method.k", 1, "--tuning", "codec", "--check")


# -- generation ------------------------------------------------------------------------------------
@pytest.fixture
def generate_fails(fails, plain, tmp_path):
    """`fails` for the generator, with further options; on a good checkpoint if none is given."""

    def run(*arguments) -> str:
        ckpt = () if "--ckpt" in arguments else ("--ckpt", plain)
        return fails(generate, *ckpt, "--out", tmp_path / "out", *arguments)

    return run


def test_bad_prompts_are_refused(generate_fails, tmp_path):
    assert "no prompt: give --prompt TEXT" in generate_fails()
    assert "no prompt: give --prompt TEXT" in generate_fails("--prompt", "a circle", "")
    assert r"--prompt: 'a \udcff' contains a lone surrogate" in generate_fails(
        "--prompt", "a \udcff"
    )
    path = tmp_path / "prompts.jsonl"
    assert "cannot be read" in generate_fails("--prompt-file", path)
    for bad in (
        b"{",
        b'{"text": "a circle"}',
        b'["a circle"]',
        b'{"prompt": " "}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a \\ud83d"}',  # case 15
        b'{"prompt": "a", "note": "\\ud83d"}',  # used to fail when it was written
        b'{"prompt": "a", "score": NaN}',  # its images were another prompt's when resumed
        b'{"prompt": "a", "prompt": "b"}',  # the last one was drawn
        b"[" * 100_000,
    ):
        path.write_bytes(b'{"prompt": "a \xe2\x80\xa8 circle"}\n\n' + bad + b"\n")
        assert f"{path} line 3" in generate_fails("--prompt-file", path)
    path.write_text('{"prompt": "a circle"}', encoding="utf-16")
    assert f"{path} is UTF-16, not UTF-8: save it as" in generate_fails("--prompt-file", path)
    path = tmp_path / "prompts.txt"
    for bad in (b"a \xff circle", b"a \x00 circle"):
        path.write_bytes(b"a circle\n" + bad)
        assert f"{path} line 2 is not" in generate_fails("--prompt-file", path)
    path.write_text('{"prompt": "a circle"}')
    assert "line 1 is JSON: give the file a name" in generate_fails("--prompt-file", path)
    path.write_text("{a red circle}\n")  # not JSON, but a prompt like any other
    assert read_prompts((), path) == [{"prompt": "{a red circle}"}]
    for name in ("prompts.json", "prompts.CSV"):  # their lines must not be drawn as prompts
        path = tmp_path / name
        path.write_text("prompt\na circle")
        assert "files cannot be read; give a .txt file" in generate_fails("--prompt-file", path)
    path = tmp_path / "prompts.JSONL"
    path.write_text('"a circle"')
    assert f"{path} line 1 has no text" in generate_fails("--prompt-file", path)


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("a.txt", ["# mine", "a dot", "// more"], "2 of 3 lines look like comments"),
        ("a.txt", ["1. a dot", "2. a ring"], "2 of 2 lines look like comments"),
        ("a.md", ["- a dot"], "1 of 1 lines look like"),
        ("a.txt", ["a dot --n blur --w 512", "a dot"], "1 of 2 lines hold settings of another"),
        ("a.txt", ['"a dot",', "'a ring'"], "2 of 2 lines"),
        ("a.txt", ["Prompt\tCategory", "a dot\tshapes"], "('Prompt\\tCategory')"),
        ("a.txt", ["a 3D dot - red", "2 dots", '"big" dot', "a dot (red:1.2)"], None),
        ("a.jsonl", ['{"prompt": "a dot", "seed": 7, "id": 1}'], "seed: not read"),
        ("a.jsonl", ['{"prompt": "# a dot", "id": 1}'], None),
    ],
)
def test_prompt_files_of_other_programs(tmp_path, caplog, name, lines, said):
    """Comments, list marks and settings are drawn or ignored, but not in silence."""
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    assert len(read_prompts((), path)) == len(lines)
    assert (said in caplog.text) if said else not caplog.records
    read_prompts((str(path), "a.txt"), None)  # only the first is there
    assert caplog.text.count("draws these words; --prompt-file") == 1


def test_bad_drawing_options_are_refused(generate_fails):
    prompt = ("--prompt", "a circle")
    for scale in ("0.5", "1e38"):
        message = generate_fails(*prompt, "--cfg-scale", scale)
        assert f"cfg_scale={float(scale)} must be at least 1" in message and "most 1000" in message
    assert "found no GPU" in generate_fails(*prompt, "--device", "cuda")
    assert "dtype 'half' must be" in generate_fails(*prompt, "--dtype", "half")
    assert "must be at least 1" in generate_fails(*prompt, "--samples", 0)
    assert "batch_size=1000000000 must be at most 65,536" in generate_fails(
        *prompt, "--batch-size", 10**9
    )
    assert "--cfg-scale" in generate_fails(*prompt, "--cfg-scal", 3)
    # Nothing may be written that would claim images with these settings.
    for wrong in (("--temperature", 1, 0.5), ("--stride", 9), ("--window", 9)):
        assert wrong[0].strip("-") + "=" in generate_fails(*prompt, *wrong)


def test_repeated_options_and_nan_are_refused(generate_fails, train_fails):
    """Cases 19, 27: of two --prompt the parser would keep the last, and NaN would pass the checks
    that compare.
    """
    twice = generate_fails("--prompt", "a circle", "--prompt", "a square")
    assert "--prompt is given 2 times: give it once, followed by all values" in twice
    assert "--log.prompts is given 2 times" in train_fails("--log.prompts", "a", "--log.prompts=b")
    # Of options with one value, the last counts.
    assert "steps=0 must" in train_fails("--steps", 3, "--steps", 0)
    assert "sampling.temperature=nan must" in generate_fails(
        "--prompt", "a", "--temperature", "nan"
    )
    assert "optim.codec_lr=nan must be a number" in train_fails("--optim.codec-lr", "nan")
    assert "optim.betas=(0.9, 1.0) must be" in train_fails("--optim.betas", 0.9, 1)
    assert "epochs=inf must be a number above 0" in train_fails("--epochs", "inf")
    with pytest.raises(UserError, match="temperature is nan, which is not of the type"):
        from_json(SamplingConfig, {"temperature": float("nan")}, "config.json")


def test_bad_checkpoints_are_refused(generate_fails, plain, tiny_world, tmp_path):
    def message(folder: Path) -> str:
        return generate_fails("--prompt", "a circle", "--ckpt", folder)

    assert f"checkpoint folder {tmp_path / 'none'} does not exist" in message(tmp_path / "none")
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file, not a folder" in message(tmp_path / "file")
    run = plain.parents[1]
    assert f"perhaps you meant {plain}" in message(run / "checkpionts" / plain.name)
    for above in (run.parent, plain.parent):
        assert "is not a complete checkpoint folder" in message(above)
        assert re.search(r"/checkpoints/step_\d{6} is one", message(above))
    assert "is not a complete checkpoint folder" in message(tiny_world / "data")
    as_base = generate_fails("--prompt", "a circle", "--ckpt", plain, "--base.family", "rar")
    assert f"--base.family is for a published base: {plain} uses llamagen, not rar" in as_base
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    os.truncate(copy / "backbone.safetensors", 1000)
    assert "backbone.safetensors is missing or does not have" in message(copy)
    assert f"it is a part of {copy}" in message(copy / "training_state")
    (copy / "manifest.json").unlink()
    assert "manifest.json is missing" in message(copy)


def test_folders_of_other_programs_are_named(generate_fails, train_fails, fails, tmp_path):
    """All were called checkpoints without a manifest, also where a base was asked for."""
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    (snapshot := hub / "snapshots" / "0af1").mkdir(parents=True)
    (adapter := tmp_path / "peft").mkdir()
    (adapter / "adapter_config.json").touch()
    (state := tmp_path / "deepspeed" / "global_step5").mkdir(parents=True)
    (state / "mp_rank_00_model_states.pt").touch()
    (state.parent / "zero_to_fp32.py").touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, said in {
        hub: f"a place in the hub's cache, whose model is {snapshot}",
        adapter: "it is an adapter alone: merge it into its base",
        state: "the zero_to_fp32.py in it or above it",
        state.parent: "it is a training state of DeepSpeed",
        empty: "",
    }.items():
        base = fails(generate, "--prompt", "a", "--base.weights", folder)
        for of_base in (base, train_fails("--backbone.weights", folder)):
            assert f"{folder} is not a backbone folder" in of_base and said in of_base
        of_checkpoint = generate_fails("--prompt", "a", "--ckpt", folder)
        assert "is not a complete checkpoint folder" in of_checkpoint and said in of_checkpoint


def test_a_checkpoint_given_as_base_is_refused(fails, plain):
    message = fails(generate, "--prompt", "a circle", "--base.weights", plain)
    assert f"{plain} is a checkpoint, not a base: give it as --ckpt" in message
    encoder = ("--ckpt", plain, "--base.text-encoder", "a/b/c")
    assert "a hub folder written owner/repo" in fails(generate, "--prompt", "a circle", *encoder)
    janus = ("--base.family", "janus", "--base.weights", "nowhere")  # used to ask for a file
    assert "a hub folder written owner/repo" in fails(generate, "--prompt", "a circle", *janus)


# -- in new processes ------------------------------------------------------------------------------
@pytest.mark.slow  # new processes import everything; the tests above call the same functions
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["launch/train_llamagen.py", "shapes-control", "--data.source", "none"],
            "none does not exist",
        ),
        (
            ["launch/generate.py", "--ckpt", "none", "--prompt", "a circle"],
            "folder none does not exist",
        ),
    ],
    ids=["train", "generate"],
)
def test_scripts_end_in_one_line(command, message, tmp_path):
    script, *arguments = command
    run = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    said = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert done.returncode == 1 and not said  # older versions of torch print about Gloo
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def run_here(folder: Path, code: str, *arguments: str, **environment: str):
    """Run Python code in a new process that starts in this folder."""
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    where = {"env": os.environ | environment, "cwd": folder}
    return subprocess.run([*run, *arguments], capture_output=True, timeout=600, **where)


def test_a_deleted_working_directory_is_reported(tmp_path):
    """Without the check, libraries would fail while they are imported."""
    code = "import os; from launch import generate as g; os.rmdir(os.getcwd()); g.cli.run(g.main)"
    done = run_here(tmp_path, code)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"error: the folder in which this was started has been deleted" in done.stderr


def test_an_ascii_locale(tmp_path):
    """A prompt with other letters is refused with advice (it used to be reported as lone
    surrogates), and printing other characters works (it used to fail).
    """
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "from launch import generate as g; g.cli.run(g.main)"
    done = run_here(tmp_path, code, "--prompt=rød", **ascii_only)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"is not text in ascii" in done.stderr and b"PYTHONUTF8=1" in done.stderr
    code = "from t2i import cli; cli.run(lambda: print('0.5 \\u00b1 0.1'))"
    done = run_here(tmp_path, code, **ascii_only)
    assert done.returncode == 0 and done.stdout.startswith(b"0.5 ") and not done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    ],
)
def test_too_little_memory_ends_in_one_line(error, capsys):
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(fail)
    told = capsys.readouterr().err
    *traceback, advice = told.splitlines()
    assert stopped.value.code == 1 and traceback[0].startswith("Traceback")
    assert advice.startswith("error: there is not enough memory") and "--batch-size" in advice
    with pytest.raises(RuntimeError, match="another"):
        cli.run(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_too_many_images_are_refused_at_once(generate_fails):
    """All of them used to be listed first, which took minutes or all the memory."""
    message = generate_fails("--prompt", "a circle", "--samples", 10**9)
    assert "more than the 10,000,000 images" in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line(number, capsys):
    # A shell starts background jobs with SIGINT ignored, and the tests may be such a job.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda: os.kill(os.getpid(), number))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130 and capsys.readouterr().err.startswith("interrupted")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the program's handler is removed"


def test_a_closed_or_full_output_is_no_error(monkeypatch, capfd):
    """The reader may leave, as `| head` does, and the disk may be full. With short output, which is
    buffered, the error occurs only when the program ends.
    """

    def unread() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", open(writer, "w"))  # noqa: SIM115 (closed with it)

    unread()
    cli.run(lambda: print("a line"))
    unread()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: print("a line" * 100_000))
    assert stopped.value.code == 128 + signal.SIGPIPE
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        cli.run(lambda: print("a line"))
    monkeypatch.undo()

    def fail() -> None:
        raise BrokenPipeError(errno.EPIPE, "of another pipe")

    with pytest.raises(BrokenPipeError):
        cli.run(fail)
    assert capfd.readouterr().err == ""
