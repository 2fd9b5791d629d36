"""Processes of a run watch each other: if one is frozen, or gone with its machine, the run ends.

The others would wait for it in an exchange of gradients, for as long as the library's limit of half
an hour. (One that dies is noticed by the launcher.)
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from t2i.processes import Processes

log = logging.getLogger(__name__)

_SECONDS = 1.0
"""Between two looks."""
_IN_A_STEP, _ELSEWHERE = 20, 900
"""Looks without a sign of life. Saving may keep a process from giving one; a step does not."""


class PeerWatch:
    """Counts signs of life of the next process, in a small server in the first one.

    Looks are counted, not seconds: a machine that sleeps wakes up with all its processes.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        self._limit, self._looks, self._silent = _ELSEWHERE, 0, 0
        self._over = threading.Event()

    def __enter__(self) -> "PeerWatch":
        if self._processes.world_size > 1:
            host, server = os.environ["MASTER_ADDR"], []

            def serve() -> int:
                server.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False))
                return server[0].port

            port = self._processes.on_main(serve)
            patience = timedelta(seconds=_IN_A_STEP * _SECONDS)
            self._store = server[0] if server else dist.TCPStore(host, port, timeout=patience)
            for work in (self._look, self._judge):
                threading.Thread(target=work, name="peer-watch", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    @contextmanager
    def step(self) -> Iterator[None]:
        """While a step is taken, a sign of life is due soon."""
        self._limit = _IN_A_STEP
        try:
            yield
        finally:
            self._limit = _ELSEWHERE

    @property
    def _next(self) -> int:
        return (self._processes.rank + 1) % self._processes.world_size

    def _look(self) -> None:
        """Give a sign of life, and look for one; waits for as long as the first process does not
        answer.
        """
        before = -1
        while not self._over.wait(_SECONDS):
            try:
                self._store.add(str(self._processes.rank), 1)
                count = self._store.add(str(self._next), 0)
            except dist.DistError:
                return  # the server is gone
            self._silent = self._silent + 1 if count == before else 0
            self._looks, before = self._looks + 1, count

    def _judge(self) -> None:
        unanswered, before = 0, -1
        while not self._over.is_set():
            time.sleep(_SECONDS)
            unanswered = unanswered + 1 if self._looks == before else 0
            before = self._looks
            if max(unanswered, self._silent) > self._limit and not self._over.is_set():
                rank = self._next if self._silent > self._limit else 0
                log.error(
                    "process %d has given no sign of life for %g seconds: it is frozen, or its "
                    "machine is gone. The run ends; --resume goes on from the newest checkpoint",
                    rank,
                    self._limit * _SECONDS,
                )
                os._exit(1)
