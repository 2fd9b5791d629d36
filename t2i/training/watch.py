"""The processes of a run watch each other: if one freezes, or its machine is gone, the run ends.

Otherwise the others would wait for it while exchanging gradients, until the communication library
gives up after half an hour. (The launcher notices a process that dies.)
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
"""Time between two looks."""
_IN_A_STEP, _ELSEWHERE = 20, 900
"""Looks without a sign of life before the run ends; saving may block signs for long, a step not."""


class PeerWatch:
    """Watches the next process's signs of life, counted in a small server in the first process.

    Limits are numbers of looks, not seconds, so that a machine may sleep and wake up again.
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
        """Apply the short limit while a step is taken."""
        self._limit = _IN_A_STEP
        try:
            yield
        finally:
            self._limit = _ELSEWHERE

    @property
    def _next(self) -> int:
        return (self._processes.rank + 1) % self._processes.world_size

    def _look(self) -> None:
        """Give a sign of life and look for the next process's; blocks while the server does not
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
        """End the run if the server does not answer, or the next process gives no sign of life."""
        unanswered, before = 0, -1
        while not self._over.is_set():
            time.sleep(_SECONDS)
            unanswered = unanswered + 1 if self._looks == before else 0
            before = self._looks
            if max(unanswered, self._silent) > self._limit and not self._over.is_set():
                rank = self._next if self._silent > self._limit else 0
                log.error(
                    "process %d has given no sign of life for %g seconds: it is frozen, or its "
                    "machine is gone. The run ends; --resume continues from the newest checkpoint",
                    rank,
                    self._limit * _SECONDS,
                )
                os._exit(1)
