"""Rehearsals at real size: the files that are written, what is measured, and the order of the
stages.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from geneval_golden import SHAPE
from geneval_golden import state_dict as golden_detector
from helpers import on_meta

import t2i
from geneval.detector_rehearsal import checkpoint_shapes
from launch import rehearse
from launch.rehearse import STAGES, Rehearsal, Stages
from t2i.errors import UserError
from t2i.models.janus import janus_rehearsal
from t2i.models.janus.janus_prompts import BOS, JanusPrompts
from t2i.models.llamagen.t5_files import load_tokenizer
from t2i.rehearsal import layout, measured
from t2i.rehearsal.measured import Measured, run_measured
from t2i.rehearsal.random_weights import RandomWeights, shapes_of
from t2i.rehearsal.rehearsal_report import predictions, table
from t2i.weights import read_folder, read_state_dict

SHAPES = {"a.weight": (300, 7), "a.bias": (7,), "norm.weight": (300,), "b.weight": (5, 2, 3)}


# -- files -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("nest", ["model", None])
def test_pickles(nest, tmp_path):
    path = RandomWeights().pickle(tmp_path / "x.pt", SHAPES, nest=nest, tied={"tied": "a.weight"})
    found = read_state_dict(path)
    assert shapes_of(found) == SHAPES | {"tied": (300, 7)}
    check_numbers(found)
    assert torch.equal(found["tied"], found["a.weight"])
    assert path.stat().st_size < 4 * 2 * sum(map(torch.numel, found.values()))
    stored = torch.load(path, weights_only=True)
    assert (list(stored) == [nest]) == (nest is not None)


def test_safetensors_in_shards(tmp_path):
    RandomWeights().sharded(tmp_path, SHAPES, torch.bfloat16, most=4000)
    assert len(list(tmp_path.glob("model-0000*-of-00002.safetensors"))) == 2
    found = read_folder(tmp_path)
    assert shapes_of(found) == SHAPES and found["a.weight"].dtype == torch.bfloat16
    check_numbers(found)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(map(torch.numel, found.values()))


def check_numbers(found):
    assert 0.018 < found["a.weight"].float().std() < 0.022
    assert not found["a.bias"].any() and (found["norm.weight"] == 1).all()


def test_sparse_files_take_no_disk(tmp_path):
    """Files of a published size have names, shapes and full length, but take no space, so a full
    disk is enough.
    """
    weights, shapes = RandomWeights(holes=True), {"big": (4096, 65536)}
    for path in (
        weights.pickle(tmp_path / "x.pt", shapes, nest="model"),
        weights.safetensors(tmp_path / "x.safetensors", shapes, torch.float32),
    ):
        assert path.stat().st_size > 2**30 and 512 * path.stat().st_blocks < 2**20
        assert shapes_of(read_state_dict(path)) == shapes


def test_the_detectors_names_are_mmdetections():
    assert checkpoint_shapes(SHAPE) == {
        name: tuple(tensor.shape) for name, tensor in golden_detector().items()
    }


@pytest.mark.slow
def test_janus_tokenizer_has_the_published_ids(tmp_path):
    for size, pad in {"1B": 100002, "7B": 100015}.items():
        janus_rehearsal.byte_level(janus_rehearsal._SPECIAL_IDS[size]).save(
            str(tmp_path / "tokenizer.json")
        )
        prompts = JanusPrompts.load(tmp_path)
        assert prompts.pad_id == pad and prompts.token_id(BOS) == 100000
        assert prompts.boi_id == pad + 1
        ids = prompts.encode(["a red fox,  twice"])[0]
        assert ids[0] == 100000 and ids[-1] == pad + 1 and max(ids[3:-3]) < 100000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny LlamaGen, written in the way the published sizes are."""
    out = tmp_path_factory.mktemp("rehearsal")
    layout.write("llamagen", "tiny", str(out))
    return out


def test_a_written_model_loads(tiny):
    base = json.loads((tiny / "base" / "rehearsal.json").read_text())["base"]
    backbone = t2i.load_backbone("llamagen", **{"source": base.pop("weights"), **base})
    encoder = backbone.frozen.text_encoder
    assert encoder.encode(["a red fox"])[0].isfinite().all()
    assert len(load_tokenizer(encoder.folder, 32128)) == 32100
    assert encoder.notes(["a red fox"]) == [[]]
    assert len(list((tiny / "data").glob("*.png"))) == 4


def test_shapes_of_a_local_model_are_known_without_reading_it(tiny, monkeypatch):
    """--check on local files used to read all of them, the text encoder included."""
    base = json.loads((tiny / "base" / "rehearsal.json").read_text())["base"]
    whole = t2i.load_backbone("llamagen", **{"source": base.pop("weights"), **base})

    def refuse(*arguments, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr("t2i.models.llamagen.t5_files.T5EncoderModel.from_pretrained", refuse)
    meta = t2i.load_backbone(
        "llamagen", tiny / "base", text_encoder=base["text_encoder"], device="meta"
    )
    assert shapes_of(meta.state_dict()) == shapes_of(whole.state_dict())
    assert all(p.is_meta for p in meta.parameters())
    encoder = meta.frozen.text_encoder
    assert encoder.model.device.type == "meta" and encoder.notes(["a red fox"]) == [[]]


# -- measuring -------------------------------------------------------------------------------------
def test_a_command_is_measured(tmp_path):
    code = "import time; x = bytearray(300_000_000); print('done'); time.sleep(0.3)"
    found = run_measured([sys.executable, "-c", code], tmp_path / "log", seconds=60)
    assert found.code == 0 and found.output == "done\n"
    assert 300e6 < found.own <= found.resident < 400e6


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path):
    command = ["sh", "-c", "sleep 600 & echo $!; wait"]  # it starts one at once
    found = run_measured(command, tmp_path / "log", seconds=1)
    assert found.code == -9 and found.seconds < 30
    status = Path(f"/proc/{int(found.output)}/stat")
    assert not status.exists() or status.read_text().split()[2] in "XZ"


# -- stages ----------------------------------------------------------------------------------------
REPORT = """memory per process: in all
  state, as above                   2.00 GB
  image tokenizer and text encoder  500.0 MB
  activations of one pass           1.00 GB (4.2 MB of logits, fp32, in it)
  temporary tensors                 22.0 MB
  while images are encoded          3.00 GB, before there is an optimizer
  peak, plus 10 %                   3.87 GB (computed from shapes, not measured)
run folder
  runs/x
  a checkpoint  500.0 MB of weights, 1.50 GB of training state
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stages without their commands; returns what was run, and a function to run them
    again.
    """
    ran: list[str] = []

    def measure(command, log, *, seconds, **env):
        name = log.stem
        ran.append(name)
        place = tmp_path / {"write": "base", "export": "export"}.get(name, f"runs/{name[-4:]}")
        if name.startswith(("write", "train", "export")):
            assert not place.exists()
            place.mkdir(parents=True)
            (place / "x").write_bytes(b"12345")
            written = {"side": 64, "base": {"weights": "w"}, "program": "p", "recipe": "r"}
            (place / "rehearsal.json").write_text(json.dumps(written))
        return Measured(int(name in fails), 1.0, 1.0, 4 * 10**9, 10**9, 7, REPORT)

    def start(**options) -> list[str]:
        ran.clear()
        return Stages(Rehearsal("llamagen", "XL", out=tmp_path, **options)).run()

    fails: set[str] = set()
    monkeypatch.setattr(measured, "run_measured", measure)
    return ran, fails, start


def test_all_stages_once(run, tmp_path):
    ran, fails, start = run
    of_judges = {"judge", "judge-again"}
    fails.add("export")
    assert start(memory=100.0) == ["export"]
    assert ran == [n for n in STAGES if n not in of_judges | {"reload"}]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["train-full"]["bytes"] > 5
    assert (tmp_path / "base").exists(), "kept for the next attempt"
    fails.clear()
    assert start(memory=100.0) == [] and ran == ["export", "reload"]
    assert not (tmp_path / "base").exists() and not (tmp_path / "runs").exists()
    assert start(memory=100.0) == [] and not ran
    (tmp_path / "results.json").write_text(json.dumps({"export": rows["export"] | {"done": True}}))
    assert start(memory=100.0, stages=("reload",)) == []
    assert ran == ["write", "train-lora", "export", "reload"], "the files were deleted"


def test_classes_of_llamagen_are_written_as_published(tmp_path):
    """Reference figures: c2i_B_256.pt has 111 M parameters, in fp32 under "model"."""
    layout.write("llamagen", "c2i-B", str(tmp_path), holes=True)
    written = json.loads((tmp_path / "base" / "rehearsal.json").read_text())
    assert written["program"] == "train-imagenet" and written["recipe"] == "llamagen-b-256"
    assert 4 * 110e6 < (tmp_path / "base" / "c2i_B_256.pt").stat().st_size < 4 * 112e6
    backbone = t2i.load_backbone("llamagen", device="meta", source=written["base"]["weights"])
    assert backbone.spec.cond_kind == "class" and backbone.spec.grid == (16, 16)


def test_stages_that_do_not_fit_are_skipped(run, tmp_path):
    ran, _, start = run
    assert start(memory=3.0) == []
    assert ran[-1] == "check-full" and "train-lora" not in ran
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["train-full"]["skipped"] == "needs 3.5 GB, and may take 3.0 GB"
    assert rows["draw"]["skipped"] == "train-lora is not done"
    assert "left out: needs 3.5 GB" in (tmp_path / "table.md").read_text()


def test_memory_is_compared_beyond_an_empty_process_and_large_errors_are_bold():
    said = predictions(REPORT)
    assert said["peak"] == 2e9 + 5e8 + 1e9 + 22e6 and said["saved"] == 2e9
    row = {"done": True, "seconds": 1, "cpu_seconds": 1, "resident": 1e9, "own": 1e9, "read": 0}
    row["bytes"] = 2.4e9
    rows = {
        "libraries": row,
        "check-full": row | {"predicted": said},
        "train-full": row | {"resident": 1e9 + 1.1 * said["peak"]},
    }
    line = table(rows, STAGES).splitlines()[-1]
    assert "| 3.52 GB | +10% |" in line and line.endswith("| 2.40 GB | **+20%** |")
    rows["libraries"] = row | {"done": False, "code": 1}
    assert "| 3.52 GB |  |" in table(rows, STAGES).splitlines()[-1], (
        "not compared without the memory of an empty process"
    )


def test_wrong_names(capsys, monkeypatch):
    for words, message in (
        (["llamagen", "S"], "llamagen has no size S; choose one of B, L, XL"),
        (["rar", "B", "--stages", "wriet"], "no stage wriet; perhaps you meant write; choose one"),
        (
            ["rar", "B", "--holes", "--stages", "load"],
            "rar has no stage load with --holes; choose",
        ),
        (
            ["mask2former", "swin-s", "--stages", "load"],
            "mask2former has no stage load; choose",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["rehearse.py", *words])
        with pytest.raises(UserError, match=message):
            rehearse.main()
    # These used to be noticed after training, or not at all.
    for name, value in (("codes", 0), ("minutes", -1.0), ("memory", 0.0)):
        with pytest.raises(UserError, match=f"{name}={value} must be"):
            Rehearsal("rar", "B", **{name: value})


@pytest.mark.slow
def test_a_tiny_model_passes_all_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", f"rehearse.py llamagen tiny --out {tmp_path} --codes 4 --keep".split()
    )
    rehearse.main()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert all(row["done"] for row in rows.values()) and len(rows) == len(STAGES) - 2
    assert (
        rows["hash-again"]["read"] < rows["hash"]["read"] + 100_000
    )  # starting a program reads a little


# -- sizes -----------------------------------------------------------------------------------------
def test_published_files_have_their_published_sizes(tmp_path):
    """Reference figures: AR_256_B.ckpt 1.83 GB, rar_b.bin 1,043,822,726 bytes, flan-t5-xl's encoder
    half 1,223,527,424 parameters.
    """
    from t2i.models.rar.rar_model import RAR, RARConfig
    from t2i.models.rar.rar_rehearsal import SIZES

    shapes = shapes_of(on_meta(RAR, RARConfig(**SIZES["B"])).official_state_dict())
    path = RandomWeights(holes=True).pickle(tmp_path / "rar_b.bin", shapes, nest=None)
    assert path.stat().st_size == pytest.approx(1_043_822_726, rel=1e-4)
    layout.write("open_magvit2", "B", str(tmp_path), holes=True)
    assert 1.83e9 < (tmp_path / "base" / "AR_256_B.ckpt").stat().st_size < 1.84e9


@pytest.mark.parametrize("name", ["data/mine.png", "results.json"])
def test_a_folder_in_other_use_is_refused(tmp_path, name):
    """`--out .` used to delete data/, runs/ and cache/ of the working directory."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"scores": {}}')
    with pytest.raises(UserError, match=f"holds {name.split('/')[0]}, which no rehearsal wrote"):
        Stages(Rehearsal("llamagen", "tiny", out=tmp_path))
    assert (tmp_path / name).read_text() == '{"scores": {}}'


def test_a_rehearsal_keeps_its_precision(tmp_path):
    """Peaks in fp32 used to be compared with predictions for bf16."""
    rows = {"write": {"done": True}, "check-lora": {"done": True, "precision": "bf16"}}
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert Stages(Rehearsal("rar", "B", out=tmp_path)).rows == rows
    with pytest.raises(UserError, match=r"holds a rehearsal in bf16.*or --precision bf16"):
        Stages(Rehearsal("rar", "B", out=tmp_path, precision="fp32"))
