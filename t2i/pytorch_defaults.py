"""What PyTorch assumes if nothing else is said: gradients, type and device. Code of others, in a
notebook or a reward's file, changes it for everything that runs in the same process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def defaults_kept() -> Iterator[None]:
    """Undo what code of others changes in PyTorch's defaults, which training shares with it:
    scripts that score images often switch gradients off for good, or choose a type or device.
    """
    gradients, dtype, device = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.empty(0).device,
    )
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.empty(0).device != device:
            torch.set_default_device(device)


@contextmanager
def usual_defaults() -> Iterator[None]:
    """PyTorch's own defaults, whatever a notebook has made of them: gradients that are switched off
    cannot train, and another type trains other weights.
    """
    cpu = torch.device("cpu")
    # Every call of PyTorch takes longer in this context, so it is entered only if it is needed.
    device = nullcontext() if torch.empty(0).device == cpu else cpu
    with torch.inference_mode(False), torch.enable_grad(), defaults_kept(), device:
        torch.set_default_dtype(torch.float32)
        yield
