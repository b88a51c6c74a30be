"""The machine that computes: which device, in which precision, how much memory is free, and how a CPU gets it."""

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from cdiffset import ranks
from cdiffset.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}


class Form(NamedTuple):
    """Where weights lie and how."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format  # of convolutions' weights


AS_STORED = Form(torch.device("cpu"), torch.float32, torch.preserve_format)


def form_of(device: str | None, precision: str) -> Form:
    """What --device and --precision (fp32, fp16 or bf16) ask for."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    # Half precisions are computed with channels last, for which their kernels are made; float32 stays as it is.
    memory_format = torch.preserve_format if dtype == torch.float32 else torch.channels_last
    return Form(choose_device(device), dtype, memory_format)


def choose_device(wanted: str | None, candidates: Sequence[str] = ("cuda", "mps", "cpu")) -> torch.device:
    """The device of that name, or the first of the candidates that is there; of several GPUs each process takes its own."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = next(kind for kind in candidates if is_there[kind])
    if available == "cuda" and wanted is None:
        wanted = f"cuda:{ranks.local_rank() % torch.cuda.device_count()}"
    try:
        device = torch.device(wanted or available)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {wanted!r} is not available here ({reason}), available: {available}") from error
    return device


def without_instructions(device: torch.device, precision: str) -> str | None:
    """A note where a CPU has to convert to compute in bf16 or fp16, which takes several times as long as float32."""
    if device.type != "cpu" or precision not in ("bf16", "fp16"):
        return None
    capabilities = getattr(torch.cpu, "get_capabilities", lambda: {precision: True})  # which PyTorch before 2.11 cannot say
    if any(has and precision in name for name, has in capabilities().items()):
        return None
    return f"note: this CPU has no instructions for {precision}, float32 is several times faster on it"


def quickest_precision(device: torch.device) -> str:
    """bf16 where the device has instructions for it, else fp32."""
    return "fp32" if without_instructions(device, "bf16") else "bf16"


def quickest_autocast(device: str) -> torch.autocast:
    """Mixed precision where the device has instructions for bfloat16; a CPU without them is several times faster in float32."""
    enabled = quickest_precision(torch.device(device)) == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled)


def be_deterministic(wanted: bool, device: torch.device) -> None:
    """Have a GPU come to the same bits in every run, or allow it kernels that add up in any order: of gradients, above all.

    CPUs have no such kernels. To be called before the first product of matrices.
    """
    wanted = wanted and device.type == "cuda"
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; without it PyTorch refuses
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds mistakes, takes time
    torch.use_deterministic_algorithms(wanted)


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep what is freed for the next tensors, where tensors lie in the machine's own memory.

    By default it hands large blocks back to the system at once, which then clears each page of the next tensor before its
    first use: that costs a training iteration on a CPU more than its backward pass. Does nothing without glibc.
    """
    if device.type == "cpu" and sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for option, value in NEVER.items():
            library.mallopt(option, value)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device, those included that PyTorch holds without using them."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
