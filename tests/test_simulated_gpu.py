"""Programs on a simulated GPU compute what they compute on the CPU (simulated_gpu.py)."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import folder_content
from PIL import Image
from programs import ROOT, launch
from runs import SAME_SUM, assert_same_metrics, metrics, plain_options

from t2i.tensorar.speed import compiler_lacks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(compiler_lacks(torch.device("cpu"))), reason="no C++ compiler"),
    pytest.mark.skipif(torch.__version__ < (2, 14), reason="written for a newer PyTorch"),
]
CODES = 16  # of an image of the tiny base
FP32 = ("--engine.precision", "fp32")


@pytest.fixture(scope="module")
def simulate(tmp_path_factory):
    """Runs a program on the simulated GPU and returns what it counted there: operations, replays of
    graphs, waits for the GPU. The program must succeed.
    """
    library = tmp_path_factory.mktemp("simulated_gpu") / "library.so"
    simulator = [str(ROOT / "tests" / "simulated_gpu.py"), str(library)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

    def run(*command, processes: int = 1) -> dict[str, int]:
        several = [*torchrun, str(processes)] if processes > 1 else []
        # Training in this process would have chosen the CPU for its children.
        environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
        done = subprocess.run(
            [sys.executable, *several, *simulator, *map(str, command)],
            cwd=ROOT,
            env=environment | {"TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        counts = ast.literal_eval(re.search(r"simulated: (\{.*\})", done.stdout)[1])
        assert counts["operations"] > 0
        return counts

    return run


def test_what_a_gpu_refuses(simulate, tmp_path):
    (tmp_path / "faulty.py").write_text("""if True:
        import pytest
        import torch

        x = torch.ones(2, device="cuda")

        def record():
            return torch.cuda.graph(torch.cuda.CUDAGraph())

        with pytest.raises(RuntimeError, match="tensors of cuda:0, and of the cpu"):
            x + torch.ones(2)
        with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
            x.numpy()
        with pytest.raises(AssertionError, match="while recording"), record():
            x.sum().item()
        with pytest.raises(AssertionError, match="while recording"), record():
            x.to("cpu")
        with pytest.raises(AssertionError, match="while recording"), record():
            torch.ones(2).to("cuda")
        assert (x + torch.tensor(1) + 1).cpu().tolist() == [3, 3]
        assert x[torch.tensor([0])].device.type == "cuda"
    """)
    simulate(tmp_path / "faulty.py")


def test_replays_read_what_is_there_then(simulate, tmp_path):
    """Recording runs nothing; a replay reads its tensors anew, but a Python number is frozen."""
    (tmp_path / "recorded.py").write_text("""if True:
        import torch
        x, y, step = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y.add_(2 * x * step)
        assert y.tolist() == [0, 0]
        x.fill_(3)
        step = 100
        graph.replay()
        graph.replay()
        assert y.tolist() == [12, 12] and y.device.type == "cuda"
    """)
    assert simulate(tmp_path / "recorded.py")["replays"] == 2


def test_a_run(plain, simulate, tiny_world):
    """Under ZeRO-3 it trains as on the CPU without ZeRO, and continues from its checkpoint."""
    options = plain_options(tiny_world, "gpu")
    stage = ("--engine.zero-stage", 3, "--log.save-every", 2)
    program = ["launch/train_llamagen.py", *options, *FP32, *stage]
    simulate(*program)
    assert_same_metrics(metrics(tiny_world, "gpu"), metrics(tiny_world, "plain"), SAME_SUM)
    shutil.rmtree(tiny_world / "runs" / "gpu" / "checkpoints" / "step_000003")
    simulate(*program, "--resume")
    assert_same_metrics(metrics(tiny_world, "gpu"), metrics(tiny_world, "plain"), SAME_SUM)


def test_two_gpus_train_as_one(plain, simulate, tiny_world):
    options = [*plain_options(tiny_world, "gpus"), *FP32, "--engine.zero-stage", 2]
    simulate("launch/train_llamagen.py", *options, processes=2)
    assert_same_metrics(metrics(tiny_world, "gpus"), metrics(tiny_world, "plain"), SAME_SUM)


def test_own_drafts_lora_and_samples(simulate, tiny_world):
    """Of a Janus model, at two learning rates, with everything that a run does besides steps."""
    base = ("shapes-janus-lora", "--backbone.weights", tiny_world / "janus")
    lines = ("--log.sample-every", 2, "--log.validate-every", 2, "--log.save-every", 2)
    plain = plain_options(tiny_world, "janus")[3:]
    options = [*base, *plain, *lines, *FP32, "--method.own-drafts", 0.5]
    launch("launch/train_janus.py", *map(str, options))
    expected = metrics(tiny_world, "janus")
    run = tiny_world / "runs" / "janus"
    run.rename(run.with_name("janus-cpu"))
    simulate("launch/train_janus.py", *options)
    assert_same_metrics(metrics(tiny_world, "janus"), expected, SAME_SUM)


def test_micro_batches_do_not_wait(plain, simulate, tiny_world):
    """A GPU gets them, and draws own drafts, while this process goes on."""
    waits = []
    for steps in (1, 3):
        options = plain_options(tiny_world, f"steps-{steps}")
        program = ["launch/train_llamagen.py", *options, "--method.own-drafts", 0.5]
        waits.append(simulate(*program, "--engine.micro-batch", 1, "--steps", steps)["waits"])
    micro_batches = 16  # of each step
    assert 0 < waits[1] - waits[0] < micro_batches


def test_drawing(plain, simulate, tiny_world, tmp_path):
    """Images are those of the CPU, and the same step by step, by graphs and with speculation."""
    prompts = ("--prompt", "a photo of a red circle", "--samples", "2")
    program = ["launch/generate.py", "--ckpt", str(tiny_world / "runs" / "plain"), *prompts]
    launch(*program, "--speed", "eager", "--speculate", "off", "--out", str(tmp_path / "cpu"))
    drawn, waits = {}, {}
    for speed, speculate in [("eager", "off"), ("graphs", "off"), ("graphs", "4")]:
        way, out = f"{speed}-{speculate}", tmp_path / f"{speed}-{speculate}"
        options = ("--speed", speed, "--speculate", speculate, "--dtype", "float32", "--out", out)
        counts = simulate(*program, *options)
        assert (counts.get("replays", 0) > 0) == (speed == "graphs")
        drawn[way], waits[way] = images(out), counts["waits"]
    assert drawn["eager-off"] == drawn["graphs-off"] == drawn["graphs-4"]
    for path in map(Path, drawn["eager-off"]):
        pair = [pixels(folder / path) for folder in (tmp_path / "cpu", tmp_path / "eager-off")]
        assert abs(pair[0] - pair[1]).max() <= 1  # the decoder rounds differently
    # One by one, no step waits; with speculation each call does, once.
    assert waits["graphs-off"] == waits["eager-off"]
    assert 0 < waits["graphs-4"] - waits["graphs-off"] < CODES


def test_every_family(simulate, tmp_path):
    """With TensorAR, a new backbone's codes and losses are those of the CPU."""
    (tmp_path / "families.py").write_text("""if True:
        import torch
        from helpers import BACKBONES, open_gates, tiny_codes, tiny_prepared

        from t2i.rng import make_keys
        from t2i.sampling import SamplingConfig
        from t2i.tensorar import presets
        from t2i.tensorar.model import TensorAR
        from t2i.tensorar.sampler import sample_windows

        config, shared = SamplingConfig(cfg_scale=2.0, top_k=20, renoise=0.5), torch.arange(3)
        for name, make in BACKBONES.items():
            model = open_gates(TensorAR(make(), presets.iclr2026()).eval())
            drawn, losses = [], []
            for device, speed, ahead in [("cpu", "eager", 0), ("cuda", "graphs", 0), ("cuda", "graphs", 3)]:
                model.to(device)
                prepared = tiny_prepared(model.backbone, 3)
                keys = make_keys(0, shared).to(device)
                windows = sample_windows(model, prepared, keys, config, speed=speed, speculate=ahead)
                assert windows.device.type == device, name
                drawn.append(windows.cpu())
                codes = tiny_codes(model.backbone, 3, 16).to(device)
                condition = model.backbone.encode_condition(prepared)
                inputs = model.training_windows(codes, condition, keys)
                found = model(codes, condition, inputs)
                found.loss.backward()
                norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
                losses.append(torch.stack([found.loss, norm]).detach().cpu())
                model.zero_grad()
            assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2]), name
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    """)
    assert simulate(tmp_path / "families.py")["replays"] > 0


def test_drawing_in_bf16(plain, simulate, tiny_world, tmp_path):
    """The default on a GPU; text encoder, trunk and decoder take it."""
    program = ["launch/generate.py", "--ckpt", tiny_world / "runs" / "plain"]
    simulate(*program, "--prompt", "a photo of a ring", "--out", tmp_path / "drawn")
    assert images(tmp_path / "drawn")


def test_a_small_gpu_judges_what_it_has_drawn(simulate, tmp_path):
    """It draws as many images at once as it has room for. The judge comes there when everything is
    drawn and the model is gone, but is tried before.
    """
    (tmp_path / "judge.py").write_text(f"""if True:
        import gc, json, pathlib, sys, torch
        from types import SimpleNamespace

        from geneval import detectors, run
        from t2i.tensorar import room
        from t2i.tensorar.model import TensorAR

        out, seen, load = pathlib.Path("{tmp_path}/out"), [], detectors.load_detector
        room.gpu_bytes = lambda device: 1

        def load_detector(name, *, device, **options):
            gc.collect()
            models = sum(isinstance(o, TensorAR) for o in gc.get_objects())
            seen.append((torch.device(device).type, models, len([*out.rglob("0000?.png")])))
            return load(name, device=device, **options)

        detectors.load_detector = load_detector
        sys.argv[1:] = f"--ckpt shapes --prompts shapes --limit 1 --samples 2 --out {{out}}".split()
        run.main()
        assert seen == [("cpu", 1, 0), ("cuda", 0, 2)], seen
        assert json.loads((out / "images/generation.json").read_text())["batch_size"] == 1
    """)
    simulate(tmp_path / "judge.py")


def test_published_files_can_be_read_without_a_gpu(simulate, tmp_path):
    """Tensors of a GPU are never pickled."""
    (tmp_path / "publish.py").write_text(f"""if True:
        import pathlib, pytest, torch, t2i

        model = t2i.load_backbone("llamagen", "shapes")
        assert model.device.type == "cuda"
        with pytest.raises(AssertionError, match="pickled"):
            torch.save(model.state_dict(), "{tmp_path}/faulty.pt")
        model.save_official(pathlib.Path("{tmp_path}"), torch.float32)
    """)
    simulate(tmp_path / "publish.py")
    assert torch.load(tmp_path / "model.pt", weights_only=True)["model"]


def images(folder: Path) -> dict[str, bytes]:
    return {k: v for k, v in folder_content(folder).items() if k.endswith(".png")}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)
