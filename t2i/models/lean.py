"""Operations that save less for the backward pass than plain ones, with bit-identical results:
what is not saved is recomputed.

They pay off because a trunk's blocks hold most of training's memory (docs/performance.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def keep_less() -> bool:
    """Whether a backward pass may follow in eager mode (a compiler decides itself what to save)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def swiglu(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x."""
    return _SwiGLU.apply(gate, x) if keep_less() else F.silu(gate) * x


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, x):
        ctx.save_for_backward(gate, x)
        return F.silu(gate) * x

    @staticmethod
    def backward(ctx, grad):
        gate, x = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * x, gate), grad * F.silu(gate)


class Dropout(nn.Dropout):
    """Saves a bool mask instead of the factors; on a GPU, nn.Dropout's own operation does this."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p and keep_less()) or x.device.type != "cpu":
            return super().forward(x)
        return _Dropout.apply(x, 1 - self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, share):
        kept = torch.empty_like(x).bernoulli_(share)
        ctx.share = share
        ctx.save_for_backward(kept.bool())
        return x * kept.div_(share)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return grad * kept.to(grad.dtype).div_(ctx.share), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm: normalized in fp32, cast back, then scaled."""
    x32 = x.float()
    inverse = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if keep_less():
        return _Scaled.apply(x32, inverse, weight, x.dtype)
    return (x32 * inverse).to(x.dtype) * weight


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x32, inverse, weight, dtype):
        ctx.save_for_backward(x32, inverse, weight)
        ctx.dtype = dtype
        return (x32 * inverse).to(dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x32, inverse, weight = ctx.saved_tensors
        unit = (x32 * inverse).to(ctx.dtype)
        d_weight = (grad * unit).sum(tuple(range(grad.dim() - 1)))
        d_unit = (grad * weight).to(ctx.dtype).float()
        d_inverse = (d_unit * x32).sum(-1, keepdim=True)
        return d_unit * inverse, d_inverse, d_weight.to(weight.dtype), None
