"""Codes <-> overlapping windows (arXiv 2505.16324, section 3.2; strides are our extension).

Window i starts at position p_i = i * stride and holds positions p_i .. p_i + k - 1; slots past the
last position are padding. With stride 1 a position is drafted in the last slot and then moves one
slot forward per step, so every code is predicted k times.

A stride s > 1 only changes how images are drawn: slots 0..s-1 of every window are final, so T / s
calls are enough. The trunk still reads one input per code, as in training: a window is fed as the s
windows that begin at its final codes (`fed`), and the next window is drawn from the last output.

Shapes: B batch, T image tokens, N windows, k slots, s stride, S sub-tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t2i.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Geometry of the windows over `tokens` positions."""

    tokens: int
    size: int
    """Slots per window, k."""
    stride: int = 1

    def __post_init__(self):
        if not 1 <= self.size <= self.tokens:
            raise UserError(
                f"window size k={self.size} must be between 1 and the {self.tokens} tokens of an image"
            )
        if not 1 <= self.stride <= self.size:
            raise UserError(
                f"stride={self.stride} must be between 1 and the window size k={self.size}: a larger one would skip positions"
            )

    @property
    def count(self) -> int:
        """Number of windows N: each position is in slots 0..stride-1 of exactly one of them."""
        return -(-self.tokens // self.stride)

    @property
    def stages(self) -> int:
        """How many times a position is predicted, including its first draft."""
        return -(-self.size // self.stride)

    def shrunk(self, size: int, stride: int = 1) -> "Windows":
        """The same positions with only the first `size` slots (0: all) and this stride."""
        if size > self.size:
            raise UserError(f"window={size} is larger than the model's k={self.size}")
        return replace(self, size=size or self.size, stride=stride)

    def fed(self, windows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The trunk's inputs for windows [B, n, k, S]: one window beginning at each of their final
        codes, [B, n s, k, S], and the number of known slots in each, int64 [n s] (None: all).
        """
        if self.stride == 1:
            return windows, None
        shift_s = torch.arange(self.stride, device=windows.device)
        slots = windows.shape[2]
        source_sk = shift_s[:, None] + torch.arange(slots, device=windows.device)
        shifted = windows[:, :, source_sk.clamp(max=slots - 1)]
        return shifted.flatten(1, 2), (slots - shift_s).repeat(windows.shape[1])

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each slot, int64 [N, k]; past T - 1 for padding."""
        starts = torch.arange(self.count, device=device) * self.stride
        return starts[:, None] + torch.arange(self.size, device=device)

    def valid(self, device: torch.device | str = "cpu") -> Tensor:
        """Which slots hold a position of the image, bool [N, k]."""
        return self.positions(device) < self.tokens

    def gather(self, codes: Tensor) -> Tensor:
        """Codes [B, T, S] -> windows [B, N, k, S]; padding repeats the last code, so mask it with
        `valid`.
        """
        assert codes.shape[1] == self.tokens, (codes.shape, self.tokens)
        return codes[:, self.positions(codes.device).clamp(max=self.tokens - 1)]

    def final_codes(self, windows: Tensor) -> Tensor:
        """Windows [B, N, k, S] -> the finished codes [B, T, S] (slots 0..stride-1)."""
        return windows[:, :, : self.stride].flatten(1, 2)[:, : self.tokens]

    def stage_codes(self, windows: Tensor, stage: int) -> Tensor:
        """Codes [B, T, S] of the image at refinement `stage` (1 = first drafts, `stages` = final).

        Position p is read from the window `stages - stage` steps before the last one that holds it,
        or, near the start of the image, from the earliest window that holds it.
        """
        if not 1 <= stage <= self.stages:
            raise ValueError(
                f"stage {stage} must be between 1 and {self.stages} (window {self.size}, stride {self.stride})"
            )
        position = torch.arange(self.tokens, device=windows.device)
        window, slot = position // self.stride, position % self.stride
        # How many earlier windows hold the position.
        deepest = torch.div(self.size - 1 - slot, self.stride, rounding_mode="floor")
        back = torch.minimum(
            torch.minimum(window, deepest), torch.tensor(self.stages - stage, device=windows.device)
        )
        return windows[:, window - back, slot + back * self.stride]
