"""Runs a command with a time limit and measures its time, memory, and bytes read.

Memory is that of the process that was started, from Linux's /proc: VmHWM is its peak resident
memory, including pages of mapped files, which the system can drop at any time; RssAnon is memory
of its own (the largest of many samples).
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    """Measurements of a command."""

    code: int
    """Exit code; if negative, the signal that ended it."""
    seconds: float
    cpu_seconds: float
    """CPU time of all its processes; other work on the machine affects it less than `seconds`."""
    resident: int
    """Bytes, VmHWM."""
    own: int
    """Bytes, the largest RssAnon."""
    read: int
    """Bytes that it requested to read, not counting mapped files."""
    output: str
    """The end of its output."""


def run_measured(command: Sequence[str], log: Path, *, seconds: float, **env: str) -> Measured:
    """Run a command in its own process group, with its output in `log`.

    After `seconds` the group is killed. `env` is added to the environment.
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
                time.sleep(_SAMPLE_SECONDS)
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
    """Bytes of memory available to a new process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _numbers(pid: int, name: str) -> dict[str, int]:
    """The numbers in one of a process's files in /proc; empty if the process has just ended."""
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
