"""The small world of `soak.py`: a tiny base, pictures, runs of both, and how they are compared."""

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from t2i.checkpoint import run_checkpoints
from t2i.files import file_sha256, read_json, write_json
from t2i.manifest import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train_llamagen.py"
STEPS, SAVE_EVERY = 40, 5
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """A folder with base/, data/, cache/ and runs/."""

    folder: Path
    seed: int
    patience: float
    """Seconds after which a process counts as hanging."""

    def moments(self, case: str) -> random.Random:
        """Where a case takes its random moments from."""
        return random.Random(f"{self.seed} {case}")

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def words(self, name: str, **options: object) -> list[str]:
        """The command line of a run, but for the program; `data_source=` is --data.source."""
        own: dict[str, object] = {
            "backbone_weights": self.folder / "base",
            "method_k": 3,
            "data_source": self.folder / "data",
            "data_cache_dir": self.folder / "cache",
            "data_validation_samples": 9,
            "optim_codec_lr": 1e-2,
            "optim_backbone_lr": 1e-3,
            "engine_micro_batch": 4,
            "engine_zero_stage": 1,
            "batch_size": 8,
            "token_dropout": 0.1,
            "ema": 0.9,
            "steps": STEPS,
            "log_log_every": 1,
            "log_validate_every": 10,
            "log_sample_every": 0,
            "log_save_every": SAVE_EVERY,
            "log_tracker": "none",
            "run_dir": self.run_dir(name),
        }
        parts = ("backbone", "method", "data", "optim", "engine", "log")
        found = ["shapes-iclr2026"]
        for key, value in (own | options).items():
            part, _, rest = key.partition("_")
            option = f"{part}.{rest}" if part in parts else key
            found += [f"--{option.replace('_', '-')}", str(value)]
        return found


def build_world(folder: Path, seed: int, patience: float) -> World:
    """Make what is not there yet."""
    from t2i.shapes.shapes_source import write_dataset

    if not (folder / "base" / "config.json").exists():
        _write_base(folder / "base")
    if not (folder / "data").exists():
        write_dataset(folder / "data", 60, size=32)
    return World(folder, seed, patience)


def _write_base(folder: Path) -> None:
    """A backbone folder of a LlamaGen with random weights: 4x4 codes of 8 pixels."""
    import torch

    from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
    from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
    from t2i.shapes.tiny_t5 import build_tiny_t5

    torch.manual_seed(0)
    shape = {"dim": 64, "n_layer": 2, "n_head": 2, "ffn_dim": 128, "vocab_size": 64}
    texts = {"cond": "text", "caption_tokens": 12, "caption_dim": 32}
    config = LlamaGenConfig(grid=(4, 4), **shape, **texts)
    gpt = LlamaGen(config)
    vq = VQTokenizer(VQConfig(32, (1, 1, 1, 1), 1, 32, codebook_size=64, codebook_dim=8))
    for p in (*gpt.parameters(), *vq.parameters()):
        torch.nn.init.normal_(p, std=0.2)
    words = "a photo of two red green blue circle square star left right above below"
    build_tiny_t5(folder / "text_encoder", [words], d_model=32, d_ff=32, num_layers=1)
    torch.save(vq.state_dict(), folder / "vq.pt")
    torch.save({"model": gpt.official_state_dict()}, folder / "gpt.pt")
    files = {"weights": "gpt.pt", "tokenizer": "vq.pt", "text_encoder": "text_encoder"}
    write_json(folder / "config.json", {"family": "llamagen", **files, "config": asdict(config)})


# -- time ------------------------------------------------------------------------------------------
class Clock:
    """Seconds that this process ran: while a machine sleeps, or pauses everything, none pass."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def look(self) -> float:
        time.sleep(0.005)
        now = time.monotonic()
        self.seconds += min(now - self._last, 0.5)
        self._last = now
        return self.seconds


def wait_until(condition: Callable[[], bool], patience: float, clock: Clock | None = None) -> bool:
    """Whether it came true in time."""
    clock = clock or Clock()
    limit = clock.seconds + patience
    while not condition():
        if clock.look() > limit:
            return False
    return True


# -- starting --------------------------------------------------------------------------------------
@dataclass
class Started:
    """Processes of one run, and what they say."""

    ids: list[int]
    log: Path
    process: subprocess.Popen | None = None

    def codes(self, patience: float, clock: Clock | None = None) -> list[int] | None:
        """Exit codes; None, and all are killed, if it takes too long."""
        found: dict[int, int] = {}

        def all_ended() -> bool:
            for i in self.ids:
                if i not in found and (code := self._ended(i)) is not None:
                    found[i] = code
            return len(found) == len(self.ids)

        if not wait_until(all_ended, patience, clock):
            self.kill()
            return None
        return [found[i] for i in self.ids]

    def _ended(self, process: int) -> int | None:
        if self.process is not None:
            return self.process.poll()
        done, status = os.waitpid(process, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None

    def kill(self) -> None:
        for i in self.ids:
            try:
                os.kill(i, signal.SIGKILL)
            except ProcessLookupError:
                continue
            if self.process is None:
                os.waitpid(i, 0)
            else:
                self.process.wait()

    def alive(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return not any(os.waitid(os.P_PID, i, options) for i in self.ids)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def said(self, *words: str) -> str:
        """The last line with one of these words, without the world's place."""
        lines = [line for line in self.text().splitlines() if any(w in line for w in words)]
        place = str(self.log.parents[1])
        return lines[-1].replace(place, "...")[:300] if lines else ""


def fork(
    world: World,
    name: str,
    words: Sequence[str],
    *,
    count: int = 1,
    program: Path = TRAIN,
    inject: Callable[[], object] = lambda: None,
) -> Started:
    """So many processes that run a program together, forked from this one: imports are done.

    `inject` is called in each of them before the program.
    """
    log = world.folder / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    port, ids = free_port(), []
    for rank in range(count):
        ids.append(os.fork())
        if ids[-1] == 0:
            _become(program, words, log, {"RANK": rank, "WORLD_SIZE": count, "PORT": port}, inject)
    return Started(ids, log)


def _become(
    program: Path, words: Sequence[str], log: Path, place: dict[str, int], inject: Callable
) -> None:
    """In a forked child: run the program and leave."""
    code = 1
    try:
        with open(log, "a" if place["RANK"] else "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        names = {"RANK": place["RANK"], "LOCAL_RANK": place["RANK"]}
        names |= {"WORLD_SIZE": place["WORLD_SIZE"], "MASTER_PORT": place["PORT"]}
        os.environ |= {k: str(v) for k, v in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        sys.argv = [str(program), *map(str, words)]
        import runpy

        inject()
        runpy.run_path(str(program), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launched(
    world: World,
    name: str,
    words: Sequence[str],
    *,
    by: str,
    program: Path = TRAIN,
    env: dict[str, str] | None = None,
) -> Started:
    """A run as a user starts it: by itself, or two processes by "torchrun" or "deepspeed"."""
    log = world.folder / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    before = {
        "process": [],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"],
    }[by]
    before = [*before, str(free_port())] if by == "deepspeed" else before
    inherited = {k: v for k, v in os.environ.items() if k not in _LAUNCHERS}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *before, str(program), *map(str, words)],
            env=inherited | _ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (env or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Started([process.pid], log, process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_of(run_dir: Path, rank: int | None = None) -> list[int]:
    """Processes with the run folder among their arguments; of one rank alone if given."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            ours = str(run_dir).encode() in path.read_bytes().split(b"\0")
            variables = (path.parent / "environ").read_bytes().split(b"\0") if ours else []
        except OSError:
            continue
        if ours and (rank is None or f"RANK={rank}".encode() in variables):
            found.append(int(path.parent.name))
    return found


# -- comparing -------------------------------------------------------------------------------------
def newest_step(run_dir: Path) -> int:
    found = run_checkpoints(run_dir)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def steps_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def fingerprint(run_dir: Path) -> dict[str, str]:
    """Hashes of the files of the newest checkpoint and of the best model, and all metrics."""
    found = {}
    for folder in (run_checkpoints(run_dir)[-1], run_dir / "best"):
        for name, entry in read_json(folder / MANIFEST)["files"].items():
            if name != "config.json":  # names the run folder
                found[f"{folder.name}/{name}"] = entry["sha256"]
                assert file_sha256(folder / name) == entry["sha256"], f"{folder / name} is damaged"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("images_per_s")
    return found | {"metrics": json.dumps(rows)}


@contextmanager
def small_disk(world: World, size: int) -> Iterator[Callable[[int], None] | None]:
    """A file system of so many bytes at `world.folder`/disk, and how to make it larger.

    None where this user may not mount one.
    """
    place = world.folder / "disk"
    place.mkdir(exist_ok=True)

    def mount(options: str) -> bool:
        words = shlex.split(f"mount -t tmpfs -o {options} tmpfs {place}")
        return subprocess.run(words, capture_output=True).returncode == 0

    if not mount(f"size={size}"):
        yield None
        return
    try:
        yield lambda more: None if mount(f"remount,size={more}") else sys.exit("remount failed")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
