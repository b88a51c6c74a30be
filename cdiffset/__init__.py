"""C-DiffSET: SAR-to-EO image translation by fine-tuning Stable Diffusion, with a confidence map."""

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_declared = None  # the torch.library.Library of mend_torchvision; what it declares lives only as long as this object


def mend_torchvision() -> None:
    """Make `import torchvision` work beside a CPU-only PyTorch, which PyPI's torchvision, a CUDA build, does not fit.

    Its library of compiled operators cannot be loaded there, and its import stops at two of them, `nms` and `qnms`; diffusers,
    torchmetrics, lpips and pytorch-fid fail with it. Declaring the two lets the pure Python parts (models, transforms) import;
    to call them is an error. Has to run before the first import of torchvision.
    """
    global _declared
    try:
        if not version("torch").endswith("+cpu") or version("torchvision").endswith("+cpu"):
            return
    except PackageNotFoundError:
        return
    import torch  # takes seconds, which nobody has to wait for where the two fit

    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    library = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").is_file()), None)
    if library is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        torch.ops.load_library(library)
    except OSError:
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


mend_torchvision()  # here, since every module imports third-party packages before those of this project
