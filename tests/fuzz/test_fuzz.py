"""The fuzzer's corpus through the readers, always; the fuzzer itself behind the marker `fuzz`, FUZZ_SECONDS for each target."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import REPO, TARGETS  # noqa: E402


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_and_its_beginnings_are_read_or_refused(target, tmp_path):
    read, corpus = TARGETS[target]
    contents = list(corpus())
    assert len(contents) >= {"config": 15, "list": 15, "image": 35}[target]
    for content in [b"", *contents, *(content[: len(content) * 2 // 3] for content in contents)]:
        read(content, tmp_path)


@pytest.mark.fuzz
@pytest.mark.parametrize("target", TARGETS)
def test_fuzz(target, tmp_path):
    seconds = os.environ.get("FUZZ_SECONDS", "60")
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=4096", "-timeout=20", "-print_final_stats=1"]
    command = [sys.executable, str(REPO / "tests/fuzz/fuzz.py"), target, *options]
    ended = subprocess.run(command, cwd=tmp_path, text=True)
    assert ended.returncode == 0, f"the input that did it: {next(tmp_path.iterdir(), None)}"
