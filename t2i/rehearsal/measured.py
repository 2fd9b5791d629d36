"""Run a command with a bound, and measure it: time, memory, and bytes read.

Memory is the largest process's, by Linux's /proc: VmHWM is the most that was resident, pages of
mapped files included, which the system can drop at any time; RssAnon is what the process itself
holds (its largest value of many looks).
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    """What a command took."""

    code: int
    """Exit code; negative: the signal that ended it."""
    seconds: float
    cpu_seconds: float
    """Of all its processes; other work on the machine changes it less than `seconds`."""
    resident: int
    """Bytes, VmHWM."""
    own: int
    """Bytes, the most of RssAnon."""
    read: int
    """Bytes that it asked to read; what comes by way of mapped files is not in it."""
    output: str
    """The end of what it printed."""


def run_measured(command: Sequence[str], log: Path, *, seconds: float, **env: str) -> Measured:
    """Run a command in a process group of its own; what it prints goes to `log`.

    After `seconds` the group is killed. `env` joins the environment.
    """
    started, resident, own, read = time.monotonic(), 0, 0, 0
    before = os.times()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                status = _numbers(process.pid, "status")
                resident = max(resident, 1024 * status.get("VmHWM", 0))
                own = max(own, 1024 * status.get("RssAnon", 0))
                read = max(read, _numbers(process.pid, "io").get("rchar", 0))
                if time.monotonic() > started + seconds:
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(_LOOK_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    after = os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    text = log.read_text(errors="replace")
    taken = time.monotonic() - started
    return Measured(process.returncode, taken, cpu, resident, own, read, text[-20000:])


def free_memory() -> int:
    """Bytes that a new process can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _numbers(pid: int, name: str) -> dict[str, int]:
    """The numbers of one of a process's files in /proc; none if it has just ended."""
    found = {}
    try:
        lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        key, _, value = line.partition(":")
        if (first := value.split()[:1]) and first[0].isdigit():
            found[key] = int(first[0])
    return found
