"""Processes forked from this one, which saves the imports that would take most of their time."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping


def fork(work: Callable[[], object], environment: Mapping[str, object] = {}) -> int:
    """Start a process that does the work, with these environment variables added, and then ends;
    return its id.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ |= {name: str(value) for name, value in environment.items()}
        work()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # skips this process's exit handlers, pytest's among them


def start_ranks(work: Callable[[], object], count: int) -> list[int]:
    """Start `count` processes that do the work together, as torchrun would; return their ids."""
    launch = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [fork(work, {"RANK": i, "LOCAL_RANK": i, **launch}) for i in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def exit_codes(ids: list[int]) -> list[int]:
    """Wait for the processes to end and return their exit codes; -9 for a killed one."""
    return [os.waitstatus_to_exitcode(os.waitpid(i, 0)[1]) for i in ids]
