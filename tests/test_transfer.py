"""The benchmark of transfers: commands that the programs take, its numbers against independent ones, and its table."""

from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, tiny_unet
from files import save_image
from torchmetrics.functional.image import peak_signal_noise_ratio

import test as translate_command
from benchmarks import transfer
from cdiffset.config import load_config
from cdiffset.images import read_eo, to_tensor, write_tiff
from data import simulate

SIZE = transfer.SIZES["tiny"]


@pytest.fixture
def pretended(monkeypatch):
    """Commands are parsed as the programs do, not run; translations are the truth, a tenth darker. => the commands."""
    commands = []

    def timed(command: list[str], log: Path) -> dict[str, float]:
        commands.append(command)
        if command[0] == "data/simulate.py":
            assert simulate.main(command[1:]) == 0
        elif command[0] == "main.py":
            config = load_config(command[1:])
            unet = tiny_unet(in_channels=8, out_channels=5 if config.confidence else 4)
            unet.save_pretrained(Path(config.work_dir) / "best/unet")
        else:
            args = translate_command.make_parser().parse_args(command[1:])
            for path in args.sar_dir.iterdir():
                eo = read_eo(args.sar_dir.parent / "eo" / path.name)
                save_image(args.output_dir / path.name, (0.9 * eo).astype(np.uint8))
                args.variance_dir.mkdir(parents=True, exist_ok=True)
                write_tiff(args.variance_dir / f"{path.stem}.tif", eo.mean(-1))
        return {"seconds": 7.0, "gib": 1.0}

    monkeypatch.setattr(transfer, "timed", timed)
    return commands


def test_all_arms_are_run_once_and_reported(pretended, tmp_path, capsys):
    argv = ["--size", "tiny", "--output", str(tmp_path)]
    assert transfer.main(argv) == 0
    kinds = [command[0] for command in pretended]
    runs = 2 + len(transfer.ARMS) * len(SIZE.seeds)
    assert (kinds.count("data/simulate.py"), kinds.count("main.py"), kinds.count("test.py")) == (2, runs, 2 * (runs - 1))
    configs = [load_config(command[1:]) for command in pretended if command[0] == "main.py"]
    assert [config.num_iter for config in configs[:2]] == [SIZE.stage1, SIZE.stage2]
    tuned = configs[2:]
    assert {config.num_iter for config in tuned} == {SIZE.updates} and {config.confidence for config in tuned} == {True}
    assert {config.accelerator_path for config in tuned} == {str(tmp_path / "source/stage2/best")}
    assert {config.lora_rank for config in tuned} == {None, 4, 16}
    assert {config.seed for config in tuned} == set(SIZE.seeds)
    text = (tmp_path / "TRANSFER.md").read_text()
    assert "looks 9 → 3" in text and all(f"| {title} |" in text for title in (transfer.SOURCE, *transfer.ARMS))
    run_once = len(pretended)
    assert transfer.main(argv) == 0 and len(pretended) == run_once  # nothing runs again


def test_the_numbers_are_those_of_independent_computations(tmp_path):
    rng = np.random.default_rng(0)
    eo, made = (rng.integers(0, 256, (3, 16, 16, 3)).astype(np.float32) for _ in range(2))
    part = {"eo": eo, "sample": {"eo": made}}
    pairs = zip(to_tensor(made), to_tensor(eo), strict=True)
    wanted = [float(peak_signal_noise_ratio(a, b, data_range=2.0)) for a, b in pairs]
    assert transfer.mean_psnr(part) == pytest.approx(np.mean(wanted), abs=1e-4)
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "unet")
    numbers, megabytes = transfer.size_of(tmp_path)
    assert numbers == sum(weight.numel() for weight in unet.parameters())
    assert megabytes == pytest.approx((tmp_path / "unet/diffusion_pytorch_model.safetensors").stat().st_size / 1e6)


def test_the_old_kind_is_the_demo():
    written = " ".join(transfer.words(transfer.OLD))
    assert f"DEMO_SCENES := {written}\n" in (REPO / "Makefile").read_text()
