"""Real SIGKILLs at random moments, many of them: `make faults`."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from faults import finish, kill, start, wait_for
from PIL import Image
from training import assert_same_run, val_lines

from cdiffset import checkpoint
from cdiffset.inference import record

pytestmark = [pytest.mark.long, pytest.mark.skipif(not Path("/proc").is_dir(), reason="watches processes through /proc")]

RUN = {
    "num_iter": 120, "save_iter": 2, "log_iter": 5, "eval_epoch": 2, "ema_decay": 0.9, "confidence": True,
    "checkpoints_total_limit": 2, "num_worker": 1,
}  # fmt: skip
KILLS = 28
IMAGES, IMAGE_KILLS = 60, 10


def moments(work_dir: Path, rng: np.random.Generator) -> list:
    """What to wait for before a kill, each a function that says whether it is time: one kind after the other."""

    def a_while():
        due = time.monotonic() + rng.uniform(0, 2)
        return lambda: time.monotonic() > due

    def saving():
        return lambda: any(work_dir.glob(".*.building"))

    def replacing():
        return lambda: any(work_dir.glob(".*.old"))

    def pruning():
        return lambda: any(work_dir.glob(".*.pruned"))

    def validating():
        done = {int(row["iteration"]) for row in val_lines(work_dir)}
        return lambda: {int(folder.name[-6:]) for folder in (work_dir / "results").glob("*")} - done

    return [a_while, saving, a_while, replacing, a_while, pruning, validating]


def test_a_run_killed_at_random_moments_ends_like_one_that_never_was(argv, tmp_path):
    rng, command = np.random.default_rng(0), argv(tmp_path / "killed", **RUN)
    kills, seen = 0, {}
    while kills < KILLS:
        process = start("main.py", command)
        beginnings = count_beginnings(tmp_path / "killed")
        wait_for(lambda: count_beginnings(tmp_path / "killed") > beginnings, process)  # noqa: B023
        kind = moments(tmp_path / "killed", rng)[kills % 7]
        is_time = kind()
        while not is_time() and process.poll() is None:
            pass
        if process.poll() is not None:  # it came to its end before
            assert process.returncode == 0, finish(process)[1]
            shutil.rmtree(tmp_path / "killed")
            continue
        kill(process)
        finish(process)
        kills += 1
        seen[kind.__name__] = seen.get(kind.__name__, 0) + 1
    assert finish(start("main.py", command))[0] == 0
    assert finish(start("main.py", argv(tmp_path / "whole", **RUN)))[0] == 0
    print(f"{kills} kills: {seen}")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert all(checkpoint.damage(folder) is None for folder in checkpoint.list_checkpoints(tmp_path / "killed"))
    assert not list((tmp_path / "killed").glob(".*.*"))


def count_beginnings(work_dir: Path) -> int:
    """How often the log says that the U-Net was loaded: training is about to begin."""
    log = work_dir / "train_log.txt"
    return log.read_text().count("train: stage") if log.is_file() else 0


def test_a_folder_killed_at_random_moments_is_translated_whole(argv, run, tmp_path):
    run(tmp_path / "run", num_iter=1, confidence=True)
    rng = np.random.default_rng(0)
    (tmp_path / "sar").mkdir()
    for index in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (36, 44), dtype=np.uint8)).save(tmp_path / "sar" / f"{index}.png")

    def command(name: str) -> list[str]:
        options = {"sar-dir": "sar", "checkpoint": "run/latest"} | {
            f"{kind}-dir": f"{name}/{kind}" for kind in ("output", "conf", "variance")
        }
        words = [word for option, path in options.items() for word in (f"--{option}", str(tmp_path / path))]
        return [*words, "--num-inference-steps", "4", "--skip-existing"]  # one by one: batches of other sizes round otherwise

    assert finish(start("test.py", command("whole")))[0] == 0
    kills = 0
    while kills < IMAGE_KILLS:
        process = start("test.py", command("killed"))
        before = len(list((tmp_path / "killed").rglob("*.png")))
        wait_for(lambda: process.poll() is not None or len(list((tmp_path / "killed").rglob("*.png"))) > before, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        kill(process)
        kills += finish(process)[0] < 0
        if len(list((tmp_path / "killed" / "output").glob("*.png"))) == IMAGES:
            shutil.rmtree(tmp_path / "killed")
    assert finish(start("test.py", command("killed")))[0] == 0
    files, found = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != record.FILE_NAME}
        for folder in (tmp_path / "whole", tmp_path / "killed")
    )
    assert len(files) == 3 * IMAGES and files == found
    assert all((tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes() for file in files)
