"""Processes of `soak.py`'s runs: forked with everything imported, or started as a user does."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.lab.soak_world import ROOT, World, fingerprint

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_LAUNCHED: list["Started"] = []


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

    def code(self, patience: float) -> int | None:
        """Exit code of the only process; None as above."""
        codes = self.codes(patience)
        return None if codes is None else codes[0]

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
        """The last line with one of these words, without names of the place and the machine."""
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
    """So many processes that run a program together, forked from this one: imports are done.

    `inject` is called in each of them before the program.
    """
    log = world.folder / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    port, ids = free_port(), []
    for rank in range(count):
        ids.append(os.fork())
        if ids[-1] == 0:
            _become(
                program or world.program,
                words,
                log,
                {"RANK": rank, "WORLD_SIZE": count, "PORT": port},
                inject,
            )
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
    program: Path | None = None,
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
            [sys.executable, *before, str(program or world.program), *map(str, words)],
            env=inherited | _ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (env or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = Started([process.pid], log, process)
    _LAUNCHED.append(started)
    return started


def end_launched() -> None:
    """Leave no launcher behind when the soak is stopped; ranks notice that theirs is gone."""
    for started in _LAUNCHED:
        if started.alive():
            started.kill()


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


# -- runs ------------------------------------------------------------------------------------------
def reference(world: World, count: int) -> dict[str, str]:
    """The fingerprint of an undisturbed run by so many processes, made once."""
    name = f"undisturbed-{count}"
    run_dir = world.run_dir(name)
    if not (run_dir / "finished").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        run = fork(world, name, world.words(name), count=count)
        assert run.codes(world.patience * 5) == [0] * count, run.text()[-2000:]
        (run_dir / "finished").touch()
    return fingerprint(run_dir)


def finish(world: World, name: str, count: int = 1, **options: object) -> bool:
    """Go on with a run to its end; whether it is then the undisturbed one."""
    words = [*world.words(name, **options), "--resume"]
    run = fork(world, f"{name}-finish", words, count=count)
    codes = run.codes(world.patience * 5)
    assert codes == [0] * count, f"{codes}: {run.text()[-2000:]}"
    run_dir = Path(str(options.get("run_dir", world.run_dir(name))))
    return fingerprint(run_dir) == reference(world, count)
