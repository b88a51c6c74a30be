"""The machine's memory: how much is free, and how a CPU gets it."""

import ctypes
import sys

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}


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
