"""Starting, watching and killing real processes, for the tests of what survives them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",  # so that sums round alike
    "PYTHONPATH": str(REPO),
    "PYTHONWARNINGS": "ignore",  # those of old libraries, when they are imported
}
PATIENCE_S = 240
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(script: str, argv: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """`python [launcher] script argv` in a process group of its own, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(REPO / script), *argv],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Wait for the end => (exit code, the lines on stderr that are no progress bar)."""
    _, errors = process.communicate(timeout=PATIENCE_S)
    lines = [line.rpartition("\r")[2].replace("\x1b[A", "").strip() for line in errors.splitlines()]
    return process.returncode, [line for line in lines if line and "%|" not in line]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Poll until `condition`; an AssertionError with the process's words where it ends or takes too long before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.stderr.read()[-3000:]}"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """To the process and all that it started, as schedulers do."""
    os.killpg(process.pid, number)


def descendants(pid: int) -> list[int]:
    """Processes started by `pid`, and by those."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return children + [pid for child in children for pid in descendants(child)]


def are_gone(pids: list[int]) -> bool:
    """Whether none of the processes is alive (one that waits for its parent to take note of its end is not)."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            continue
    return True
