"""diffusers without what translating does not use, imported in a third of the time. To be imported before diffusers is.

diffusers imports whatever it finds of its optional packages, and the compiler of PyTorch to mark functions that are not to be
compiled; none of it belongs to this project's networks and schedulers. While diffusers is imported here, those packages are
not to be found; afterwards they are again, for others. Does nothing where diffusers has been imported already.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

UNUSED = ("bitsandbytes", "peft", "scipy", "torch._dynamo", "torchvision", "transformers", "xformers")


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Packages cannot be imported within, unless they have been before."""
    new = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(new))  # None: an import of it fails
    try:
        yield
    finally:
        for name in new:
            del sys.modules[name]


@contextmanager
def nothing_marked() -> Iterator[None]:
    """The decorator `torch.compiler.disable`, or `disable()`, does nothing within, as it would import the compiler."""
    mark, torch.compiler.disable = torch.compiler.disable, lambda function=None: function or (lambda marked: marked)
    try:
        yield
    finally:
        torch.compiler.disable = mark


with hidden(*UNUSED), nothing_marked():
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        UNet2DConditionModel,
        UniPCMultistepScheduler,
    )
