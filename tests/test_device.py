"""The C library's memory, kept once asked to."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, torch
from cdiffset.device import keep_freed_memory
if {keep}:
    keep_freed_memory(torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for index in range(25):
    if index == 20:  # until then it finds its place
        before = faults()
    torch.ones(64 * 2**20, dtype=torch.uint8)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again_without_being_cleared_by_the_system():
    """64 MiB are 16,384 pages, or 32 huge ones: the system's part in five tensors of it."""
    handed_back, kept = (
        int(subprocess.run([sys.executable, "-c", COUNT_FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    )
    assert kept < 20 and handed_back > 100
