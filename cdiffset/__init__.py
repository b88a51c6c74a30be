"""C-DiffSET: SAR-to-EO image translation by fine-tuning Stable Diffusion, with a confidence map."""

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

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
    import torch

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


class _MendWhenImported:
    """Asked by Python for every module about to be imported; mends torchvision when its turn comes.

    Mending imports PyTorch, which `--help` and mistakes in a configuration should not have to wait for.
    """

    mended = False

    def find_spec(self, name: str, path=None, target=None) -> None:
        """Always None: where a module lies, the finders after this one know."""
        if name == "torchvision" and not self.mended:
            self.mended = True  # at once, because mending looks for torchvision again
            mend_torchvision()


sys.meta_path.insert(0, _MendWhenImported())
