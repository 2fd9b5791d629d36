"""Codes <-> overlapping windows (arXiv 2505.16324, section 3.2; strides are our extension).

Window i starts at position p_i = i * stride and holds positions p_i .. p_i + k - 1; slots past the
last position are padding. With stride 1 a position is drafted in the last slot and then moves one
slot forward per step: k looks at every code.

Shapes: B batch, T image tokens, N windows, k slots, S sub-tokens.
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
                f"stride={self.stride} must be between 1 and the window size k={self.size}, or positions would be left out"
            )

    @property
    def count(self) -> int:
        """Number of windows N: every position is in slots 0..stride-1 of exactly one."""
        return -(-self.tokens // self.stride)

    @property
    def stages(self) -> int:
        """How many times a position is predicted, the first draft included."""
        return -(-self.size // self.stride)

    def shrunk(self, size: int) -> "Windows":
        """The same positions with only the first `size` slots; 0 keeps all."""
        if size > self.size:
            raise UserError(f"window={size} is larger than the model's k={self.size}")
        return replace(self, size=size or self.size)

    def starts(self, device: torch.device | str = "cpu") -> Tensor:
        """p_i, int64 [N]."""
        return torch.arange(self.count, device=device) * self.stride

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each slot, int64 [N, k]; past T - 1 for padding."""
        return self.starts(device)[:, None] + torch.arange(self.size, device=device)

    def valid(self, device: torch.device | str = "cpu") -> Tensor:
        """Which slots hold a position of the image, bool [N, k]."""
        return self.positions(device) < self.tokens

    def gather(self, codes: Tensor) -> Tensor:
        """Codes [B, T, S] -> windows [B, N, k, S]; padding repeats the last code and must be masked
        by `valid`.
        """
        assert codes.shape[1] == self.tokens, (codes.shape, self.tokens)
        return codes[:, self.positions(codes.device).clamp(max=self.tokens - 1)]

    def final_codes(self, windows: Tensor) -> Tensor:
        """Windows [B, N, k, S] -> the finished codes [B, T, S] (slots 0..stride-1)."""
        return windows[:, :, : self.stride].flatten(1, 2)[:, : self.tokens]

    def stage_codes(self, windows: Tensor, stage: int) -> Tensor:
        """The image as it stood at refinement `stage` (1 = first drafts .. `stages` = final), codes
        [B, T, S].

        Position p is read from the window that saw it `stages - stage` steps before its last; near
        the start, where no earlier window exists, from the earliest that does.
        """
        if not 1 <= stage <= self.stages:
            raise ValueError(
                f"stage {stage} must be between 1 and {self.stages} (window {self.size}, stride {self.stride})"
            )
        position = torch.arange(self.tokens, device=windows.device)
        window, slot = position // self.stride, position % self.stride
        deepest = torch.div(
            self.size - 1 - slot, self.stride, rounding_mode="floor"
        )  # earlier windows that hold it
        back = torch.minimum(
            torch.minimum(window, deepest), torch.tensor(self.stages - stage, device=windows.device)
        )
        return windows[:, window - back, slot + back * self.stride]
