"""Auditing pairs: the residual against slow loops and an oracle, boxes against blobs, and the command from end to end."""

import csv
import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, tiny_unet, tiny_vae
from PIL import Image

import audit as command
from cdiffset import errors
from cdiffset.auditing import report as audit_report
from cdiffset.auditing.residual import residual_map, scores_of, strongest_boxes, upsampled
from cdiffset.config import Config
from cdiffset.errors import UserError
from cdiffset.images import read_tiff
from cdiffset.model import load_scheduler
from cdiffset.pairing import Pair
from cdiffset.pipeline import encode
from feeders.feeder import PairedFolderFeeder, QXSFeeder

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def prompt():
    return torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(3))


def images(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ------------------------------------------------------------------------------------------------------ the residual map
@torch.no_grad()
def by_hand(unet, vae, scheduler, sar, eo, prompt, timesteps, draws, seed) -> torch.Tensor:
    """One pair, one cell and one channel at a time, from the schedule's alphas alone."""
    z_sar, z_eo = encode(vae, sar[None]), encode(vae, eo[None])
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(z_eo.shape[2:])
    for t in timesteps:
        alpha, sigma = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
        for _ in range(draws):
            noise = torch.randn(z_eo.shape, generator=generator)
            output = unet(torch.cat([z_sar, alpha * z_eo + sigma * noise], 1), t, prompt).sample[0]
            target = {"epsilon": noise, "sample": z_eo, "v_prediction": alpha * noise - sigma * z_eo}
            target = target[scheduler.config.prediction_type][0]
            for y in range(total.shape[0]):
                for x in range(total.shape[1]):
                    squares = [(target[c, y, x] - output[c, y, x]) ** 2 for c in range(4)]
                    total[y, x] += sum(squares) / 4
    return total / (len(timesteps) * draws)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("outputs", [4, 5])
def test_the_residual_is_that_of_a_slow_loop_whatever_the_batch(tiny_base, vae, prompt, prediction_type, outputs):
    scheduler, unet = load_scheduler(tiny_base, prediction_type), tiny_unet(in_channels=8, out_channels=outputs)
    sar, eo = images(3, 1), images(3, 2)
    settings = dict(timesteps=(900, 40), draws=2, seed=5)
    found = residual_map(unet, vae, scheduler, sar, eo, prompt, **settings)
    assert found.shape == (3, 1, 8, 6) and found.dtype == torch.float32
    expected = torch.stack([by_hand(unet, vae, scheduler, *pair, prompt, **settings) for pair in zip(sar, eo, strict=True)])
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    alone = residual_map(unet, vae, scheduler, sar[1:2], eo[1:2], prompt, **settings)
    torch.testing.assert_close(alone, found[1:2], rtol=1e-4, atol=1e-6)
    other = residual_map(unet, vae, scheduler, sar, eo, prompt, **{**settings, "seed": 6})
    assert not torch.allclose(other, found, rtol=1e-2)


def test_what_a_residual_cannot_be_made_of(tiny_base, vae, prompt):
    parts = (tiny_unet(in_channels=8), vae, load_scheduler(tiny_base, "epsilon"), images(1, 1), images(1, 2), prompt)
    for nothing in ({"timesteps": ()}, {"draws": 0}):
        with pytest.raises(ValueError, match="at least one timestep and one draw"):
            residual_map(*parts, **nothing)


class Oracle(torch.nn.Module):
    """A U-Net for ε-prediction that knows which EO latent belongs to a SAR, namely the SAR's own negative."""

    def __init__(self, scheduler):
        super().__init__()
        self.alphas, self.dtype = scheduler.alphas_cumprod, torch.float32

    def forward(self, latents, timesteps, encoder_hidden_states):
        z_sar, z_t = latents.chunk(2, 1)
        alpha = self.alphas[timesteps][:, None, None, None]
        return SimpleNamespace(sample=(z_t - alpha.sqrt() * -z_sar) / (1 - alpha).sqrt())


class PixelVAE(torch.nn.Module):
    """A VAE of factor 1 whose latent is the image."""

    dtype, config = torch.float32, SimpleNamespace(scaling_factor=1.0)

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels))


@pytest.fixture
def oracle_residual(tiny_base, prompt):
    scheduler = load_scheduler(tiny_base, "epsilon")
    return lambda sar, eo, **options: residual_map(Oracle(scheduler), PixelVAE(), scheduler, sar, eo, prompt, **options)


def test_an_oracle_finds_exactly_what_changed(tiny_base, oracle_residual):
    """ε̂ - ε = sqrt(ᾱ / (1 - ᾱ)) (z_eo - z_true), whatever the noise."""
    sar = images(2, 1)
    eo = -sar
    eo[1, :, 4:9, 10:14] += 0.5
    found = oracle_residual(sar, eo, timesteps=(500,))
    alpha = load_scheduler(tiny_base, "epsilon").alphas_cumprod[500]
    expected = torch.zeros(2, 1, 32, 24)
    expected[1, :, 4:9, 10:14] = 0.25 * alpha / (1 - alpha)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    threshold = float(expected.max() / 2)
    assert strongest_boxes(found[1, 0].numpy(), threshold, 5) == [(10, 4, 14, 9)]


def test_scores_rank_swapped_and_shifted_pairs_above_clean_ones(oracle_residual):
    sar = images(4, 1)
    clean, swapped, shifted = (oracle_residual(sar, eo) for eo in (-sar, -sar.roll(1, 0), -sar.roll(1, 3)))
    scores = [[scores_of(residual[0].numpy()) for residual in maps] for maps in (clean, swapped, shifted)]
    for which in (0, 1):
        worst_clean = max(score[which] for score in scores[0])
        assert worst_clean < min(score[which] for score in scores[1] + scores[2])


def test_scores_are_the_mean_and_the_99th_percentile():
    residual = np.random.default_rng(0).permutation(np.arange(10_000, dtype=np.float32)).reshape(100, 100)
    assert scores_of(residual) == pytest.approx((4999.5, 9899.01))


def test_maps_are_upsampled_within_their_range():
    coarse = torch.tensor([[[[0.0, 4.0]]]])
    assert upsampled(coarse, (1, 4))[0, 0, 0].tolist() == [0, 1, 3, 4]  # centres at 0.25, 0.75, ... of the coarse cells


# ----------------------------------------------------------------------------------------------------------------- boxes
def test_boxes_of_hand_made_blobs():
    residual = np.zeros((12, 16))
    residual[1:3, 2:5] = 2  # excess 6 x 1
    residual[5:9, 10:11] = 4  # excess 4 x 3
    residual[10, 0] = residual[11, 1] = 3  # touch at a corner: one region, excess 2 x 2
    residual[0, 15] = 1  # not above the threshold
    expected = [(10, 5, 11, 9), (2, 1, 5, 3), (0, 10, 2, 12)]
    assert strongest_boxes(residual, 1, 5) == expected and strongest_boxes(residual, 1, 2) == expected[:2]
    assert strongest_boxes(residual, 4, 5) == strongest_boxes(residual, 1, 0) == []


# ----------------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage2")
    tiny_unet(in_channels=8, out_channels=5).save_pretrained(folder / "unet")
    config = Config(pretrained_model_name_or_path=tiny_base, prompt="radar", prediction_type="sample")
    (folder / "checkpoint.json").write_text(json.dumps({"iteration": 1, "config": asdict(config)}))
    return folder


def audited(checkpoint, output: Path, *words, code=0) -> list[dict]:
    """Run audit.py => the lines of its table."""
    words = ["--checkpoint", checkpoint, "--output", output, "--device", "cpu", *words]
    assert errors.run(command.main, [str(word) for word in words]) == code
    with open(output / "audit.csv", newline="") as table:
        return list(csv.DictReader(table))


def folders_of(pair_folders: Path, split: str) -> list:
    return ["--sar-dir", pair_folders / split / "sar", "--eo-dir", pair_folders / split / "eo"]


class Sources(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.found.append(dict(attributes)["src"])


def test_two_folders(checkpoint, tiny_base, vae, pair_folders, tmp_path):
    """Every output, and the maps against residual_map itself with the checkpoint's own settings."""
    rows = audited(checkpoint, tmp_path, *folders_of(pair_folders, "test"), "--top", 3, "--drop-fraction", 0.4, "--boxes", 2)
    scores = [float(row["score"]) for row in rows]
    assert {row["name"] for row in rows} == set("01234") and scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    from cdiffset.model import embed_prompt

    feeder = PairedFolderFeeder(40, "test", pair_folders / "test" / "sar", pair_folders / "test" / "eo")
    unet, scheduler = tiny_unet(in_channels=8, out_channels=5), load_scheduler(tiny_base, "sample")
    for item in feeder:
        residual = residual_map(unet, vae, scheduler, item["sar"][None], item["eo"][None], embed_prompt(tiny_base, "radar"))
        expected = upsampled(residual, (40, 40))[0, 0].numpy()
        found = read_tiff(tmp_path / "maps" / f"{item['name']}.tif")
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        row = next(row for row in rows if row["name"] == item["name"])
        numbers = [float(row[name]) for name in ("score", "local", "max")]
        np.testing.assert_allclose(numbers, [found.mean(), np.quantile(found, 0.99), found.max()], rtol=1e-4)
        assert len(row["boxes"].split(";")) <= 2
        overlay = np.array(Image.open(tmp_path / "overlays" / f"{item['name']}.png"))
        assert overlay.shape == (200, 3 * 200 + 8, 3)
        eo = ((item["eo"].permute(1, 2, 0).numpy() + 1) * 127.5).round()
        assert np.abs(overlay[::5, 204:404:5].astype(float) - eo).max() <= 1
    sources = Sources((tmp_path / "contact_sheet.html").read_text()).found
    assert sources == [f"overlays/{row['name']}.png" for row in rows[:3]]
    assert [row["kept"] for row in rows] == ["no", "no", "yes", "yes", "yes"]
    kept = PairedFolderFeeder(40, dataroot=pair_folders / "test", listroot=tmp_path / "kept_train.txt")
    assert kept.augment and [pair.eo.stem for pair in kept.pairs] == sorted(row["name"] for row in rows[2:])


@pytest.fixture
def qxs(pair_folders, tmp_path) -> tuple[Path, Path]:
    """The training pairs in QXS's layout (one name with a comma) => (data root, YAML)."""
    root = tmp_path / "root"
    for kind, folder in (("eo", "opt_256_oc_0.2"), ("sar", "sar_256_oc_0.2")):
        (root / folder).mkdir(parents=True)
        for index in range(4):
            name = "2,b.png" if index == 2 else f"{index}.png"
            (root / folder / name).write_bytes((pair_folders / "train" / kind / f"{index}.png").read_bytes())
    (root / "train_list.txt").write_text("".join(f"opt_256_oc_0.2/{name}.png\n" for name in ("3", "0", "2,b", "1")))
    settings = {"dataroot": str(root), "listroot": str(root / "train_list.txt"), "crop_size": 32}
    (tmp_path / "qxs.yaml").write_text(json.dumps({"feeder": "feeders.feeder.QXSFeeder", "train_feeder_args": settings}))
    return root, tmp_path / "qxs.yaml"


def test_a_configuration_and_its_list(checkpoint, qxs, tmp_path, capsys):
    """Whole images, though the feeder crops; the kept list keeps the list's order and form; batches change nothing."""
    root, config = qxs
    rows = audited(checkpoint, tmp_path / "out", "--config", config, "--batch-size", 3)
    assert "--train-feeder-args.listroot" in capsys.readouterr().out
    assert read_tiff(tmp_path / "out" / "maps" / "opt_256_oc_0.2" / "0.tif").shape == (40, 40)
    between = (float(rows[0]["score"]) + float(rows[1]["score"])) / 2
    again = audited(checkpoint, tmp_path / "again", "--config", config, "--max-score", between)
    for row, other in zip(rows, again, strict=True):
        assert row["name"] == other["name"] and float(row["score"]) == pytest.approx(float(other["score"]), rel=1e-4)
    kept = QXSFeeder(root, tmp_path / "again" / "kept_train.txt", crop_size=32)
    order = ["opt_256_oc_0.2/" + name for name in ("3", "0", "2,b", "1")]
    assert kept.names == [name for name in order if name != rows[0]["name"]]


def test_training_on_the_kept_list(checkpoint, tiny_base, pair_folders, tmp_path, capsys):
    """The options that audit.py prints make main.py train on the kept pairs."""
    import main as training

    audited(checkpoint, tmp_path / "out", *folders_of(pair_folders, "train"))
    printed = re.search("kept ones: (.*)", capsys.readouterr().out)[1].split()
    test_folders = {f"{kind}_dir": str(pair_folders / "test" / kind) for kind in ("sar", "eo")}
    train_folders = {f"{kind}_dir": str(pair_folders / "train" / kind) for kind in ("sar", "eo")}
    settings = {
        "work_dir": str(tmp_path / "run"), "pretrained_model_name_or_path": tiny_base, "num_iter": 1, "batch_size": 2,
        "num_warmup": 0, "num_worker": 0, "num_inference_steps": 1, "val_len": 1, "lpips": False, "report_to": "none",
        "train_feeder_args": {**train_folders, "crop_size": 32},
        "test_feeder_args": {**test_folders, "split": "test", "crop_size": 32},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert errors.run(training.main, ["--config", str(tmp_path / "run.yaml"), *printed]) == 0
    assert (tmp_path / "run" / "latest" / "checkpoint.json").is_file()


def test_eo_of_a_declared_range_is_audited_as_the_same_in_8_bit(checkpoint, pair_folders, tmp_path):
    expected = audited(checkpoint, tmp_path / "8-bit", *folders_of(pair_folders, "test"))
    (tmp_path / "eo").mkdir()
    for path in (pair_folders / "test" / "eo").iterdir():
        np.save(tmp_path / "eo" / f"{path.stem}.npy", np.array(Image.open(path)) / np.float32(255))
    folders = ["--sar-dir", pair_folders / "test" / "sar", "--eo-dir", tmp_path / "eo"]
    found = audited(checkpoint, tmp_path / "float", *folders, "--eo-range", "0,1")
    for row, other in zip(found, expected, strict=True):
        assert row["name"] == other["name"] and float(row["score"]) == pytest.approx(float(other["score"]), rel=1e-4)
        assert float(row["counted"]) == 1


def test_skip_existing_keeps_maps_and_makes_the_missing(checkpoint, pair_folders, tmp_path, capsys):
    words = folders_of(pair_folders, "test")
    first = audited(checkpoint, tmp_path, *words)
    maps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "maps").iterdir()}
    (tmp_path / "maps" / "2.tif").unlink()
    assert audited(checkpoint, tmp_path, *words, "--skip-existing") == first
    assert "4 of 5 maps are there already" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "maps").iterdir()}
    assert [name for name in maps if maps[name] != after[name]] == ["2.tif"]
    audited(checkpoint, tmp_path, *words, "--skip-existing", "--seed", "1", code=2)
    assert f"error: {tmp_path / 'maps'} holds files of other settings (seed: 0 -> 1), which" in capsys.readouterr().err
    pair = Pair("2", pair_folders / "test/sar/2.png", pair_folders / "test/eo/2.png")
    with pytest.raises(UserError, match="at most 9 px are opened"):  # --max-pixels holds for the overlays as well
        audit_report.write_findings(tmp_path, [pair], 5, max_pixels=9)


def test_a_pair_whose_map_would_have_too_long_a_name_costs_no_other_pair(
    checkpoint, pair_folders, tmp_path, monkeypatch, capsys
):
    replace = os.replace

    def shorter(source, target):
        if Path(target).name == "1.tif":
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        replace(source, target)

    monkeypatch.setattr(os, "replace", shorter)
    rows = audited(checkpoint, tmp_path, *folders_of(pair_folders, "test"), code=1)
    assert {row["name"] for row in rows} == {"0", "2", "3", "4"}
    assert f"skipped: {pair_folders / 'test/eo/1.png'}: an output of it would have too long" in capsys.readouterr().err


def test_broken_pairs_are_named_and_the_rest_done(checkpoint, pair_folders, tmp_path, capsys):
    for kind in ("sar", "eo"):
        (tmp_path / kind).mkdir()
        for name in ("0.png", "1.png", "2.png"):
            (tmp_path / kind / name).write_bytes((pair_folders / "test" / kind / name).read_bytes())
    (tmp_path / "sar" / "1.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "eo" / "2.png")
    rows = audited(checkpoint, tmp_path / "out", "--sar-dir", tmp_path / "sar", "--eo-dir", tmp_path / "eo", code=1)
    stderr = capsys.readouterr().err
    assert [row["name"] for row in rows] == ["0"] and "Traceback" not in stderr
    assert f"skipped: {tmp_path / 'sar' / '1.png'}" in stderr and "differ in size" in stderr
    assert "2 of 3 pairs skipped for the reasons above" in stderr
    assert (tmp_path / "out" / "kept_train.txt").read_text() == "sar,eo\nsar/0.png,eo/0.png\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sar-dir", "sar"], "expected either --config, or --sar-dir and --eo-dir"),
        (["--config", "x.yaml", "--sar-dir", "sar", "--eo-dir", "eo"], "expected either --config, or"),
        (["--sar-dir", "missing", "--eo-dir", "eo"], "--sar-dir: there is no folder missing"),
        (["--sar-dir", "sar", "--eo-dir", "eo", "--output", "eo/out"], "--output: eo/out lies in --eo-dir"),
        (["--sar-dir", "sar", "--eo-dir", "eo", "--output", "file"], "--output: file is a file"),
        (["--sar-dir", "sar", "--eo-dir", "eo", "--output", "file/out"], "--output: cannot write into file/out: Not a"),
        (["--sar-dir", "sar", "--eo-dir", "eo", "--eo-range", "0,1"], "eo/x.png: 8-bit pixels"),
        (
            ["--sar-dir", "sar", "--eo-dir", "eo", "--drop-fraction", "1.5"],
            "--drop-fraction: expected at least 0 and at most 1",
        ),
        (["--sar-dir", "sar", "--eo-dir", "eo", "--drop-fraction", "nan"], "--drop-fraction: expected at least 0"),
        (["--sar-dir", "sar", "--eo-dir", "eo", "--top", "0"], "--top: expected at least 1, found 0"),
        (["--sar-dir", "sar", "--eo-dir", "eo", "--tip", "3"], "--tip: no such option"),
        (["--sar-dir", "sar", "--eo-dir", "eo", "--checkpoint", "missing"], "--checkpoint: there is no missing"),
        (["--config", "missing.yaml"], "--config: cannot read missing.yaml"),
    ],
)
def test_wrong_options_are_one_line(checkpoint, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for kind in ("sar", "eo"):
        (tmp_path / kind).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / kind / "x.png")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    defaults = {"--checkpoint": str(checkpoint), "--output": "out", "--device": "cpu"}
    defaults = [word for option, value in defaults.items() if option not in words for word in (option, value)]
    assert errors.run(command.main, [*words, *defaults]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}"), line
    assert sorted(tmp_path.rglob("*")) == before


def test_help_needs_no_model_libraries():
    code = "import sys, audit\ntry: audit.main(['--help'])\nexcept SystemExit: print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert "--max-score" in done.stdout and done.stdout.endswith("False\n"), done.stderr
