"""Scenes translated by real processes: several at once, and killed ones."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from faults import TORCHRUN, descendants, finish, start, wait_for
from test_scene import UTM, save, smooth, words
from test_translate import files, save_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="watches processes through /proc")

KILLS = 12


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("stage2"), tiny_base, 5)


def assert_same_files(a: Path, b: Path) -> None:
    assert files(a) == files(b)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files(a))


def test_two_processes_translate_each_its_scenes_and_wait_for_each_other(checkpoint, tmp_path, monkeypatch):
    """Though one of the scenes cannot be read, which makes the exit code 1 for both; without progress bars."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    (tmp_path / "sar").mkdir()
    save(tmp_path / "sar" / "a.tif", np.zeros((70, 70), np.uint16), nodata=0)
    for name in "bc":
        save(tmp_path / "sar" / f"{name}.tif", smooth(120, 130), **UTM)  # 12 tiles
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        process = start("test.py", words(checkpoint, tmp_path / "sar", tmp_path / name, batch_size=5), launcher)
        code, said = finish(process)
        assert code == 1 and any("1 skipped: " in line and "a.tif" in line for line in said), said
    assert {"eo/b.tif", "eo/c.tif"} <= files(tmp_path / "one")
    assert_same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
def test_scenes_killed_at_random_moments_end_like_one_that_never_was(checkpoint, tmp_path):
    rng, sar = np.random.default_rng(0), save(tmp_path / "a.tif", smooth(300, 330), **UTM)
    options = {"batch_size": 3, "num_inference_steps": 6}
    assert finish(start("test.py", words(checkpoint, sar, tmp_path / "whole", **options)))[0] == 0
    out, kills, seen = tmp_path / "killed", 0, {}
    scratch = out / "eo" / ".a.scene"
    while kills < KILLS:
        launcher = TORCHRUN if kills % 3 == 2 else ()
        process = start("test.py", words(checkpoint, sar, out, **options), launcher)
        wait_for(lambda: scratch.is_dir() or process.poll() is not None, process)  # noqa: B023
        due = time.monotonic() + rng.uniform(0, 3)
        watched = [None, ".state.part.json", "raw.tif", "cog.tif"][kills % 4]
        while process.poll() is None and time.monotonic() < due and not (watched and (scratch / watched).exists()):
            pass
        processes = [process.pid, *descendants(process.pid)]
        if process.poll() is None:
            for pid in processes:
                os.kill(pid, signal.SIGKILL)
            kills += 1
            seen[watched] = seen.get(watched, 0) + 1
        finish(process)
    assert finish(start("test.py", words(checkpoint, sar, out, **options)))[0] == 0
    print(f"{kills} kills: {seen}")
    assert_same_files(tmp_path / "whole", out)
