"""Processes that are forked from this one. They import nothing anew, which would take most of their
time.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping


def fork(work: Callable[[], object], environment: Mapping[str, object] = {}) -> int:
    """The id of a process that does the work, with these variables besides ours, and ends."""
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
        os._exit(code)  # what this process would do at its end is not the fork's business


def start_ranks(work: Callable[[], object], count: int) -> list[int]:
    """The ids of so many processes that do the work together, as torchrun would start them."""
    launch = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [fork(work, {"RANK": i, "LOCAL_RANK": i, **launch}) for i in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def exit_codes(ids: list[int]) -> list[int]:
    """Of processes, once they have ended; -9 of the killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(i, 0)[1]) for i in ids]
