"""Commands in a terminal that knows ASCII alone: nothing ends in a UnicodeEncodeError."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

REPO = Path(__file__).parents[1]
COMMANDS = ["main.py", "test.py", "evaluate.py", "calibrate.py", "audit.py", "results/table.py"]
COMMANDS += ["data/data_split.py", "data/make_chips.py", "data/simulate.py", "demo/report.py", "demo/pretrain_base.py"]
COMMANDS += [f"benchmarks/{path.name}" for path in sorted((REPO / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
ALL_HELP = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = [command, "--help"]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as ended:
        print("ended", command, ended.code)
"""
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(REPO)}


def test_every_help_can_be_read_in_an_ascii_terminal():
    environment = ASCII | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", ALL_HELP, *COMMANDS], cwd=REPO, env=environment, capture_output=True)
    printed = ended.stdout.decode("ascii")
    assert ended.returncode == 0, ended.stderr.decode()
    assert [line for line in printed.splitlines() if line.startswith("ended ")] == [f"ended {name} 0" for name in COMMANDS]
    assert "\\u03c3\\xb2 in units of the latent" in printed


def test_the_report_is_printed_in_an_ascii_terminal(tmp_path):
    for folder in ("pred", "gt"):
        (tmp_path / folder).mkdir()
        Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / folder / "0.png")
    argv = [REPO / "evaluate.py", "--pred-dir", "pred", "--gt-dir", "gt", "--no-networks", "--num-workers", "0"]
    ended = subprocess.run(
        [sys.executable, *argv, "--output", "r\u00e9sum\u00e9"], cwd=tmp_path, env=ASCII, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert b"PSNR [dB] \\u2191" in ended.stdout and b"To look at: r" in ended.stdout
    assert "PSNR [dB] ↑" in (tmp_path / "r\u00e9sum\u00e9" / "report.md").read_text(encoding="utf-8")
