"""Processes for `soak.py`'s runs: forked with all imports done, or started as by a user."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.lab.soak_world import ROOT, World, fingerprint, fresh, steps_logged

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHED: list["Started"] = []


# -- time ------------------------------------------------------------------------------------------
class Clock:
    """Counts seconds, except while the machine sleeps or pauses this process."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        """Wait 5 ms and return the seconds counted so far."""
        time.sleep(0.005)
        now = time.monotonic()
        self.seconds += min(now - self._last, 0.5)
        self._last = now
        return self.seconds


def wait_until(condition: Callable[[], bool], patience: float, clock: Clock | None = None) -> bool:
    """Wait until the condition holds, at most `patience` seconds; whether it does."""
    clock = clock or Clock()
    limit = clock.seconds + patience
    while not condition():
        if clock.tick() > limit:
            return False
    return True


# -- starting --------------------------------------------------------------------------------------
@dataclass
class Started:
    """The processes of one run, and their output."""

    ids: list[int]
    log: Path
    patience: float
    """Seconds after which the processes count as hanging."""
    process: subprocess.Popen | None = None
    """The process if it was not forked from this one; `ids` holds its id."""

    def codes(self, clock: Clock | None = None) -> list[int] | None:
        """Wait and return the exit codes; None if that takes too long: then all are killed."""
        found: dict[int, int] = {}

        def all_ended() -> bool:
            for i in self.ids:
                if i not in found and (code := self._ended(i)) is not None:
                    found[i] = code
            return len(found) == len(self.ids)

        if not wait_until(all_ended, self.patience, clock):
            self.kill()
            return None
        return [found[i] for i in self.ids]

    def end_with(self, code: int) -> None:
        """Wait for the run; AssertionError with the end of its output if an exit code differs."""
        codes = self.codes()
        assert codes == [code] * len(self.ids), f"{codes}: {self.text()[-2000:]}"

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

    def last_line(self, *words: str) -> str:
        """The last line with one of these words, without folder and host name; "" if none."""
        lines = [line for line in self.text().splitlines() if any(w in line for w in words)]
        place = str(self.log.parents[1])
        last = lines[-1].strip() if lines else ""
        return last.replace(place, "...").replace(f" on {socket.gethostname()}", "")[:300]


def fork(
    world: World,
    name: str,
    words: Sequence[str],
    *,
    count: int = 1,
    program: Path | None = None,
    inject: Callable[[], object] = lambda: None,
) -> Started:
    """Fork `count` processes, with all imports done, that run a program together.

    `inject` is called in each of them before the program starts.
    """
    log, port, ids = world.log(name), free_port(), []
    log.write_text("")
    for rank in range(count):
        ids.append(os.fork())
        if ids[-1] == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ |= {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            _become(program or world.program, words, log, inject)
    return Started(ids, log, world.most)


def _become(program: Path, words: Sequence[str], log: Path, inject: Callable) -> None:
    """In a forked child: run the program and exit."""
    code = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        sys.argv = [str(program), *map(str, words)]
        inject()
        runpy.run_path(str(program), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
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
    program: Path | None = None,
    env: dict[str, str] | None = None,
) -> Started:
    """Start a run as a user does: one process, or two under "torchrun" or "deepspeed"."""
    launcher = {
        "process": "",
        "torchrun": "-m torch.distributed.run --standalone --nproc_per_node 2",
        "deepspeed": f"-m deepspeed.launcher.runner --num_gpus 2 --master_port {free_port()}",
    }[by]
    inherited = {k: v for k, v in os.environ.items() if k not in _LAUNCHERS}
    log = world.log(name)
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *launcher.split(), str(program or world.program), *words],
            env=inherited | _ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (env or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_reset_signals,
        )
    started = Started([process.pid], log, world.most, process)
    _LAUNCHED.append(started)
    return started


def _reset_signals() -> None:
    """Let the run receive signals that this process ignores because it was started with `nohup` or
    in the background.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def end_launched() -> None:
    """Kill all launchers that still run. Their ranks notice it and end."""
    for started in _LAUNCHED:
        if started.alive():
            started.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_of(run_dir: Path, rank: int | None = None) -> list[int]:
    """Ids of processes that have the run folder among their arguments; only `rank`'s if given."""
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


# -- runs ------------------------------------------------------------------------------------------
def train(
    world: World,
    name: str,
    *,
    resume: bool = False,
    count: int = 1,
    inject: Callable[[], object] = lambda: None,
    **options: object,
) -> Started:
    """Train in forked processes; `options` as in `World.words`."""
    words = [*world.words(name, **options), *(["--resume"] if resume else [])]
    log = f"{name}-resumed" if resume else name
    return fork(world, log, words, count=count, inject=inject)


def reference(world: World, count: int) -> dict[str, str]:
    """The fingerprint of an undisturbed run by `count` processes, which is trained only once."""
    name = f"undisturbed-{count}"
    run_dir = world.run_dir(name)
    if not (run_dir / "finished").exists():
        train(world, fresh(world, name).name, count=count).end_with(0)
        (run_dir / "finished").touch()
    return fingerprint(run_dir)


def finish(world: World, name: str, count: int = 1) -> bool:
    """Resume a run to its end; whether it then equals the undisturbed one."""
    train(world, name, resume=True, count=count).end_with(0)
    return fingerprint(world.run_dir(name)) == reference(world, count)


def wait_for_step(world: World, run: Started, run_dir: Path, step: int = 1) -> None:
    """Wait until a run has logged at least `step` steps."""
    assert wait_until(lambda: steps_logged(run_dir) >= step, world.most), run.text()[-2000:]
