"""What the CPU has instructions for, and the C library's memory, kept once asked to."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from cdiffset.device import be_deterministic, without_instructions

COUNT_FAULTS = """
import resource, torch
from cdiffset.device import keep_freed_memory

def faults():
    for index in range(25):
        if index == 20:  # until then it finds its place
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

handed_back = faults()
keep_freed_memory(torch.device("cpu"))
print(handed_back, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again_without_being_cleared_by_the_system():
    """64 MiB are 16,384 pages, or 32 huge ones: the system's part in five tensors of it."""
    counted = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, check=True).stdout
    handed_back, kept = map(int, counted.split())
    assert kept < 20 and handed_back > 100


@pytest.mark.parametrize(
    ("has", "device", "precision", "noted"),
    [
        ([], "cpu", "bf16", True), (["avx512_fp16"], "cpu", "bf16", True), (["avx512_bf16"], "cpu", "bf16", False),
        (["amx_bf16"], "cpu", "bf16", False), (["avx512_bf16"], "cpu", "fp16", True), (["avx512_fp16"], "cpu", "fp16", False),
        ([], "cpu", "fp32", False), ([], "cpu", "no", False), ([], "cuda", "bf16", False),
    ],
)  # fmt: skip
def test_a_precision_that_the_cpu_only_imitates_is_told(monkeypatch, has, device, precision, noted):
    names = ("avx512_f", "f16c", "avx512_bf16", "amx_bf16", "avx512_fp16")  # as PyTorch calls them
    found = {name: name in ("avx512_f", "f16c", *has) for name in names}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    note = without_instructions(torch.device(device), precision)
    assert (f"no instructions for {precision}" in note) if noted else note is None


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="before PyTorch 2.11 a CPU's instructions are not known")
def test_pytorch_knows_these_names():
    assert {"avx512_bf16", "amx_bf16", "avx512_fp16"} <= torch.cpu.get_capabilities().keys() or platform.machine() != "x86_64"


@pytest.mark.parametrize(("wanted", "device", "expected"), [(True, "cuda", True), (False, "cuda", False), (True, "cpu", False)])
def test_only_gpus_are_told_to_be_deterministic(monkeypatch, wanted, device, expected):
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":0:0")  # so that it is taken back at the end
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    try:
        be_deterministic(wanted, torch.device(device))
        assert torch.are_deterministic_algorithms_enabled() is expected
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash attention's gradient would stay as it is
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is expected
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
