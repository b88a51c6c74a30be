"""C-DiffSET: SAR-to-EO image translation by fine-tuning Stable Diffusion, with a confidence map."""

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_declared = None  # the torch.library.Library of mend_torchvision; what it declares lives only as long as this object


def mend_torchvision() -> None:
    """Make `import torchvision` work where its compiled operators do not fit the installed PyTorch.

    PyPI's torchvision is a CUDA build. Beside a CPU-only PyTorch its library cannot be loaded, and its import then stops at
    the operators `nms` and `qnms`, whose Python side is registered without asking whether they exist; diffusers, torchmetrics,
    lpips and pytorch-fid fail with it. Declaring the two lets the pure Python parts (models, transforms) import. The operators
    themselves stay without an implementation: calling them is an error. Must run before the first import of torchvision; does
    nothing where torchvision is absent or sound.
    """
    global _declared
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.origin or hasattr(torch.ops.torchvision, "nms"):
        return
    candidates = [Path(spec.origin).parent / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]  # torchvision's own search
    library = next((path for path in candidates if path.is_file()), None)
    if library is None:
        return
    try:
        torch.ops.load_library(library)
    except OSError:
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


mend_torchvision()
