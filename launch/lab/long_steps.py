"""Training small models on a GPU: a whole step is recorded as one CUDA graph and replayed.

Loss, batches, rates, clipping and optimizer are those of `t2i.training` (`tests/test_long_grid.py`
compares the losses). It omits what takes most of a small model's time: launching every kernel from
Python, moving data at every step, validation and checkpoints. On a CPU the same step runs eagerly.
Several runs can share a GPU, each on its own stream (`long_grid.py`).
"""

from collections.abc import Callable

import torch
from torch import nn

from launch.lab.long_data import Order
from t2i.products import fast_products
from t2i.tensorar.loss import WindowLosses
from t2i.tensorar.model import TensorAR
from t2i.training.batches import Batch
from t2i.training.config import TrainConfig
from t2i.training.engine import autocast, parameter_groups

WARM_UP = 3
"""Steps that run eagerly before one is recorded."""


class Objective(nn.Module):
    """A training loss. It may have layers, which learn at the codec's rate."""

    def forward(self, model: TensorAR, batch: Batch) -> WindowLosses:
        raise NotImplementedError


class Trainer:
    """One training run. Nothing checks that losses are finite: callers find them in `losses_Rk`.

    stream: the GPU stream to record and replay steps on; without one they run eagerly.
    """

    def __init__(
        self,
        model: TensorAR,
        objective: Objective,
        config: TrainConfig,
        batches: Order,
        *,
        stream: torch.cuda.Stream | None = None,
    ):
        device = model.backbone.device
        self.model, self.objective, self.config = model.train(), objective.to(device), config
        self.batches, self.device, self.done = batches, device, 0
        self.steps = len(batches.samples_RB)
        own = [p for p in objective.parameters() if p.requires_grad]
        groups = parameter_groups(model, config)
        if own:
            groups.append({"params": own, "part": "codec", "weight_decay": 0.0, "lr": 0.0})
        self.parts = [group["part"] for group in groups]
        for group in groups:
            group["lr"] = torch.zeros((), device=device)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, betas=config.optim.betas, fused=True, capturable=device.type == "cuda"
        )
        rates = [
            [config.optim.codec_rate(s, self.steps), config.optim.backbone_rate(s, self.steps)]
            for s in range(self.steps)
        ]
        self.rates_R2 = torch.tensor(rates, device=device)
        self.losses_Rk = torch.zeros(self.steps, model.config.k, device=device)
        self.norms_R = torch.zeros(self.steps, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.stream = stream
        self._replay: Callable[[], None] | None = None

    def run(self, count: int) -> None:
        """Run this many more steps, up to the last; on a GPU, launch them without waiting."""
        count = min(count, self.steps - self.done)
        self.done += count
        if self.stream is None:
            with fast_products(self.device, self.model.windows.tokens):
                for _ in range(count):
                    self._step()
            return
        with torch.cuda.stream(self.stream):
            while count and self._replay is None:
                self._step()
                count -= 1
                if int(self.index) >= WARM_UP:
                    self._replay = self._recorded()
            for _ in range(count):
                assert self._replay is not None
                self._replay()

    def _recorded(self) -> Callable[[], None]:
        """Record a step without running it; returns its replay. `torch.cuda.graph` is not used
        because it waits for all streams.
        """
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            self._step()
        finally:
            graph.capture_end()
        return graph.replay

    def _step(self) -> None:
        rates = self.rates_R2.index_select(0, self.index)[0]
        for group, part in zip(self.optimizer.param_groups, self.parts, strict=True):
            group["lr"].copy_(rates[0 if part == "codec" else 1])
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config.engine.precision, self.device):
            found = self.objective(self.model, self.batches.batch(self.index))
        found.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.losses_Rk.index_copy_(0, self.index, (found.sums / found.counts)[None])
        self.norms_R.index_copy_(0, self.index, norm[None])
        self.index.add_(1)

    def end(self) -> TensorAR:
        """The trained model in eval mode; frees gradients and the recorded step."""
        if self.stream is not None:
            self.stream.synchronize()
        self._replay = None
        self.optimizer.zero_grad(set_to_none=True)
        return self.model.eval()
