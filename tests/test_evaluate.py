"""evaluate.py end to end on small folders: numbers against independent computations, faults, comparison, report files."""

import base64
import csv
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import evaluate
import utils
from cdiffset import errors
from cdiffset.errors import UserError
from cdiffset.evaluation import baselines, folders
from cdiffset.evaluation import evaluate as evaluation
from cdiffset.evaluation.charts import line_chart, line_figure
from cdiffset.evaluation.folders import EvaluationFolders
from cdiffset.evaluation.uncertainty import ence, reliability

# isort: split
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from cdiffset.images import write_tiff
from results import table

COUNT, SIDE = 8, 24


@pytest.fixture
def scene(tmp_path) -> Path:
    """gt/, pred/ (gt with noise of a known σ at each pixel), sar/, variance/, error/, ensemble/ and masks, 8 images each."""
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        stem = f"sub/{index}" if index % 2 else str(index)
        gt = rng.integers(60, 190, (SIDE, SIDE, 3))
        scale = rng.uniform(1, 20, (SIDE, SIDE, 1))
        pred = np.clip(gt + rng.normal(0, scale, gt.shape), 0, 255)
        write(tmp_path / "gt" / f"{stem}.png", gt)
        write(tmp_path / "pred" / f"{stem}.png", pred)
        write(tmp_path / "sar" / f"{stem}.png", rng.integers(0, 256, (SIDE, SIDE)))
        write_tiff(tmp_path / "variance" / f"{stem}.tif", scale[..., 0] ** 2 * 1e-3)
        write_tiff(tmp_path / "error" / f"{stem}.tif", scale[..., 0] * math.sqrt(2 / math.pi))
        write_tiff(tmp_path / "ensemble" / f"{stem}.tif", scale[..., 0])
        sar_only = np.zeros((SIDE, SIDE)) + 255 * (scale[..., 0] > 18)
        eo_only = 255 * (rng.uniform(size=(SIDE, SIDE)) < 0.1) * (sar_only == 0)
        write(tmp_path / "masks" / "mask_sar_only" / f"{stem}.png", sar_only)
        write(tmp_path / "masks" / "mask_eo_only" / f"{stem}.png", eo_only)
    return tmp_path


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.round().astype(np.uint8)).save(path)


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(np.float64)


def run(scene: Path, *options: str, output: str = "report", code: int = 0) -> dict:
    argv = ["--pred-dir", str(scene / "pred"), "--gt-dir", str(scene / "gt"), "--no-networks", "--num-workers", "0"]
    assert evaluate.main([*argv, "--output", str(scene / output), *options]) == code
    return json.loads((scene / output / "report.json").read_text(), parse_constant=refuse)


def refuse(constant: str):
    raise AssertionError(f"{constant} is no JSON")


def everything(scene: Path) -> list[str]:
    folders = {"sar": "sar", "variance": "variance", "error": "error", "ensemble": "ensemble", "mask": "masks"}
    return [part for option, folder in folders.items() for part in (f"--{option}-dir", str(scene / folder))]


def table_of(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stacked(scene: Path, kind: str, suffix: str = ".png") -> np.ndarray:
    return np.stack([read(path) for path in sorted((scene / kind).rglob(f"*{suffix}"))])


# ---- pictures


def test_numbers_are_those_of_the_files_in_counting_order(scene):
    report, rows = run(scene, "--sar-dir", str(scene / "sar")), table_of(scene / "report")
    assert report["images"] == COUNT and report["sizes"] == {"24 x 24": COUNT} and report["faults"] == {}
    assert [row["name"] for row in rows] == ["0", "2", "4", "6", "sub/1", "sub/3", "sub/5", "sub/7"]
    for row in rows:
        pred, gt = (read(scene / kind / f"{row['name']}.png") for kind in ("pred", "gt"))
        assert float(row["standard/psnr"]) == pytest.approx(10 * math.log10(255**2 / np.mean((pred - gt) ** 2)), abs=1e-3)
        stretched = [np.clip((pixels / 127.5 - 1) + 0.5, 0, 1) for pixels in (pred, gt)]
        assert float(row["paper/psnr"]) == pytest.approx(
            -10 * math.log10(np.mean((stretched[0] - stretched[1]) ** 2)), abs=1e-3
        )
        assert float(row["8-bit/mae"]) == pytest.approx(np.abs(pred - gt).mean(), abs=1e-3)
    psnr = np.array([float(row["standard/psnr"]) for row in rows])
    entry = report["means"]["standard"]["psnr"]
    assert entry["mean"] == pytest.approx(psnr.mean()) and entry["low"] < psnr.mean() < entry["high"]
    pred, gt, sar = (stacked(scene, kind) for kind in ("pred", "gt", "sar"))
    ratio = np.abs(pred - sar[..., None]).mean() / np.abs(pred - gt).mean()
    collapse = report["set"]["identity_collapse"]
    assert collapse["value"] == pytest.approx(ratio, rel=1e-5) and collapse["low"] < ratio < collapse["high"]
    ranked = sorted(rows, key=lambda row: -float(row["standard/psnr"]))
    assert report["examples"]["best"] == [row["name"] for row in ranked[:3]]
    assert report["examples"]["median"] == [row["name"] for row in ranked[2:5]]  # as many better as worse, or one fewer
    assert report["examples"]["worst"] == [row["name"] for row in ranked[-3:]]
    assert set(report["absent"]) == {"lpips", "dists", "fid", "kid", "inception_score", "uncertainty"}


def test_equal_images_are_infinite_and_swapping_the_folders_changes_nothing(scene):
    forwards = run(scene)["means"]
    argv = [
        "--pred-dir",
        str(scene / "gt"),
        "--gt-dir",
        str(scene / "pred"),
        "--no-networks",
        "--output",
        str(scene / "swapped"),
    ]
    assert evaluate.main(argv) == 0
    backwards = json.loads((scene / "swapped" / "report.json").read_text())["means"]
    for metric in ("psnr", "ssim", "scc"):
        assert backwards["standard"][metric]["mean"] == pytest.approx(forwards["standard"][metric]["mean"], abs=1e-5)
    shutil.rmtree(scene / "pred")
    shutil.copytree(scene / "gt", scene / "pred")
    same = run(scene, *everything(scene), output="same")
    assert same["means"]["standard"]["psnr"] == {"mean": None, "n": 0, "infinite": COUNT, "low": None, "high": None}
    assert same["means"]["standard"]["ssim"]["mean"] == pytest.approx(1, abs=1e-5)
    assert "not all 0" in same["uncertainty"]["absent"]["ranking"] and "identity_collapse" not in same["set"]
    assert "∞" in (scene / "same" / "report.md").read_text()


def test_a_copied_sar_is_warned_about(scene):
    shutil.rmtree(scene / "pred")
    shutil.copytree(scene / "sar", scene / "pred")
    assert run(scene, "--sar-dir", str(scene / "sar"))["set"]["identity_collapse"]["value"] == 0
    assert "the output copies its input" in (scene / "report" / "report.md").read_text()


def test_batches_workers_and_the_names_order_on_disk_change_nothing(scene):
    one = run(scene, *everything(scene), "--batch-size", "1")
    many = run(scene, *everything(scene), "--batch-size", "5", "--num-workers", "2", output="many")
    for path, value in flat(one).items():
        assert flat(many)[path] == pytest.approx(value, abs=1e-5), path


def flat(node, path=()) -> dict:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        return {path: node}
    return {key: value for name, child in children for key, value in flat(child, (*path, name)).items()}


class Distance(torch.nn.Module):
    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


class ColourFeatures(torch.nn.Module):
    """In place of Inception: [B, 3, H, W] in [0, 1] => [pool features [B, 6, 1, 1]]."""

    def forward(self, images):
        assert 0 <= images.min() and images.max() <= 1
        return [torch.cat([images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)], 1)]


def test_the_networks_metrics_reach_the_report(scene, monkeypatch):
    for loader, network in (("_load_lpips", Distance), ("_load_dists", Distance), ("_load_inception", ColourFeatures)):
        monkeypatch.setattr(utils, loader, network)
    monkeypatch.setattr(utils, "_load_inception_score", ColourFeatures)
    monkeypatch.setattr(ColourFeatures, "update", lambda self, pixels: None, raising=False)
    report = evaluation.evaluate_folders(EvaluationFolders(scene / "pred", scene / "gt"), scene / "report")
    mae = report["means"]["8-bit"]["mae"]["mean"]
    assert report["means"]["standard"]["lpips"]["mean"] == pytest.approx(mae / 127.5, rel=1e-4)
    assert report["means"]["standard"]["dists"]["mean"] == pytest.approx(mae / 255, rel=1e-4)
    pred, gt = (
        np.concatenate([x.mean((1, 2)), x.std((1, 2), ddof=0)], 1) for x in (stacked(scene, "pred"), stacked(scene, "gt"))
    )
    distance = ((pred.mean(0) - gt.mean(0)) ** 2).sum() / 255**2
    assert report["set"]["fid"]["value"] > 0.9 * distance and report["set"]["kid"]["subset_size"] == COUNT
    assert report["absent"]["inception_score"] == f"needs more than 10 images, got {COUNT}"
    text = (scene / "report" / "report.md").read_text()
    assert f"(the whole set of {COUNT} images)" in text and f"FID of {COUNT} images is biased upwards" in text


# ---- what does not fit


def test_every_fault_is_counted_and_named_and_strict_refuses_them(scene, capsys):
    (scene / "pred" / "0.png").unlink()
    (scene / "gt" / "2.png").unlink()
    write(scene / "gt" / "4.png", np.pad(read(scene / "gt" / "4.png"), ((2, 2), (2, 2), (0, 0)), constant_values=9))
    write(scene / "gt" / "6.png", read(scene / "gt" / "6.png")[:-1])
    (scene / "pred" / "sub" / "1.png").write_bytes(b"\x89PNG")
    (scene / "variance" / "sub" / "3.tif").unlink()
    report = run(scene, "--variance-dir", str(scene / "variance"), code=1)
    faults = report["faults"]
    assert faults["missing"] == ["0"] and faults["extra"] == ["2"] and faults["cropped"] == ["4 (28 x 28 px to 24 x 24 px)"]
    assert faults["size"] == ["6 is 24 x 23 px, the prediction 24 x 24 px"] and "sub/1.png" in faults["unreadable"][0]
    assert faults["beside"] == ["sub/3: no variance file"]
    assert report["images"] == 4 and report["uncertainty"]["images"] == 3
    assert "ground truth without a prediction: 1 (0)" in capsys.readouterr().err
    text = (scene / "report" / "report.md").read_text()
    assert all(line in text for line in ("Predictions without ground truth: 1.", "- sub/3: no variance file"))
    argv = ["--pred-dir", str(scene / "pred"), "--gt-dir", str(scene / "gt"), "--no-networks", "--strict"]
    assert errors.run(evaluate.main, [*argv, "--output", str(scene / "strict")]) == 2
    assert "--strict: ground truth without a prediction: 1 (0); predictions" in capsys.readouterr().err
    assert not (scene / "strict").exists()


def test_larger_ground_truth_is_cropped_at_its_centre(scene):
    before = run(scene)["means"]
    for path in (scene / "gt").rglob("*.png"):
        write(path, np.pad(read(path), ((5, 5), (3, 3), (0, 0)), constant_values=255))
    after = run(scene, output="cropped")
    assert after["means"]["standard"] == before["standard"] and len(after["faults"]["cropped"]) == COUNT


def test_a_list_chooses_what_counts(scene):
    (scene / "list.txt").write_text("data/opt/0.png\n\nsub/3.png\n6\nnowhere.png\n")
    report = run(scene, "--split-list", str(scene / "list.txt"))
    assert [row["name"] for row in table_of(scene / "report")] == ["0", "6", "sub/3"]
    assert report["faults"] == {"unlisted": ["nowhere.png"]}
    (scene / "pairs.csv").write_text("sar,eo\na/1.png,b/2.png\n")
    assert run(scene, "--split-list", str(scene / "pairs.csv"), output="csv")["images"] == 1
    (scene / "pairs.csv").write_text('id,EO_path,SAR_path\n1,"b/2.png",a/1.png\n2,sub/3.png,a/4.png\n')
    assert run(scene, "--split-list", str(scene / "pairs.csv"), output="columns")["faults"] == {}
    assert [row["name"] for row in table_of(scene / "columns")] == ["2", "sub/3"]
    with pytest.raises(UserError, match="x/2.png and y/2.png would both be 2"):
        (scene / "twice.txt").write_text("y/2.png\nx/2.png\n")
        run(scene, "--split-list", str(scene / "twice.txt"))


def test_a_list_that_names_no_image_is_refused(scene):
    (scene / "list.txt").write_text("nowhere.png\n")
    with pytest.raises(UserError, match="list.txt: no entry is an image of .*pred or .*gt"):
        evaluation.evaluate_folders(
            EvaluationFolders(scene / "pred", scene / "gt", split_list=scene / "list.txt"), scene / "report"
        )


@pytest.mark.parametrize(
    "report, table",
    [
        ("[]", "name\n0\n"),
        ('{"images": 1, "set": []}', "name\n0\n"),
        ('{"images": 1, "set": {"fid": {}}}', "name\n0\n"),
        ('{"images": 1, "set": {}}', "name,standard/psnr\n0,high\n"),
        ('{"images": 1, "set": {}}', "name,standard/psnr\n0\n"),
        ('{"images": 1, "set": {}}', "stem\n0\n"),
        ('{"images": 1, "set": {}}', 'name\n"' + "0" * 200_000),
    ],
)  # fmt: skip
def test_a_damaged_baseline_is_refused_before_the_work(scene, capsys, report, table):
    (scene / "other").mkdir()
    (scene / "other" / "report.json").write_text(report)
    (scene / "other" / "metrics.csv").write_text(table)
    argv = ["--pred-dir", str(scene / "pred"), "--gt-dir", str(scene / "gt"), "--output", str(scene / "report")]
    assert errors.run(evaluate.main, [*argv, "--baseline", str(scene / "other" / "report.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "neither it nor metrics.csv beside it may be changed by hand" in line and len(line) < 1000


def test_a_baseline_of_other_images_is_refused_before_the_work(scene, capsys):
    (scene / "other").mkdir()
    (scene / "other" / "report.json").write_text('{"images": 1, "set": {}}')
    (scene / "other" / "metrics.csv").write_text("name,standard/psnr\nx,1\n")
    argv = ["--pred-dir", str(scene / "pred"), "--gt-dir", str(scene / "gt"), "--output", str(scene / "report")]
    assert errors.run(evaluate.main, [*argv, "--baseline", str(scene / "other" / "report.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # no progress bar
    assert line.startswith("error: --baseline: ") and line.endswith("has none of these images")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected at least 1, found 0"),
        (["--sar-dir", "/nowhere"], "--sar-dir: there is no folder /nowhere"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not available here"),
        (["--baseline", "/nowhere/report.json"], "/nowhere/report.json: No such file"),
        (["--mask-dir", "."], "--mask-dir: it is for maps, expected --variance-dir"),
        (["--max-pixels", "0"], "--max-pixels: expected at least 1, found 0"),
    ],
)
def test_mistakes_are_one_line(scene, capsys, options, message):
    argv = ["--pred-dir", str(scene / "pred"), "--gt-dir", str(scene / "gt"), "--output", str(scene / "report")]
    assert errors.run(evaluate.main, [*argv, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}") and not (scene / "report").exists()


def test_a_report_that_cannot_be_written_is_one_line(scene, capsys):
    (scene / "file").write_text("kept")
    argv = ["--pred-dir", str(scene / "pred"), "--gt-dir", str(scene / "gt"), "--no-networks", "--num-workers", "0"]
    for output, message in (("file", "--output: .*file is a file"), ("file/report", "--output: cannot write into .*")):
        assert errors.run(evaluate.main, [*argv, "--output", str(scene / output)]) == 2
        assert re.match(f"error: {message}", capsys.readouterr().err.splitlines()[-1])
    assert (scene / "file").read_text() == "kept"


def test_folders_without_a_common_name_and_twins_are_refused(scene):
    shutil.copy(scene / "pred" / "0.png", scene / "pred" / "0.jpg")
    with pytest.raises(UserError, match="0.jpg and 0.png differ in the suffix alone"):
        run(scene)
    (scene / "other").mkdir()
    write(scene / "other" / "x.png", np.zeros((9, 9, 3)))
    with pytest.raises(UserError, match="has a twin"):
        evaluation.evaluate_folders(EvaluationFolders(scene / "other", scene / "gt"), scene / "report")


# ---- uncertainty


def test_the_maps_are_judged_by_the_pooled_pixels_and_per_image(scene):
    report = run(scene, *everything(scene))
    part = report["uncertainty"]
    pred, gt, sar = (stacked(scene, kind) for kind in ("pred", "gt", "sar"))
    variance, spread = stacked(scene, "variance", ".tif"), stacked(scene, "ensemble", ".tif")
    errors_by_name = {"absolute": np.abs(pred - gt).mean(-1), "squared": ((pred - gt) ** 2).mean(-1)}
    scores = {"variance": variance, "ensemble spread": spread, "SAR brightness": sar}
    for name, score in scores.items():
        for kind, error in errors_by_name.items():
            expected = spearmanr(score.ravel(), error.ravel()).statistic
            assert part["maps"][name]["ranking"][kind]["spearman"] == pytest.approx(expected, abs=1e-5)
    assert part["mean_error"]["squared"] == pytest.approx(errors_by_name["squared"].mean(), rel=1e-5)
    sar_only, eo_only = (stacked(scene / "masks", f"mask_{kind}") > 127 for kind in folders.MASKS)
    clean = ~(sar_only | eo_only)
    for kind, mask in (("sar_only", sar_only), ("eo_only", eo_only)):
        truth, score = mask[mask | clean], sar[mask | clean]
        assert part["maps"]["SAR brightness"][kind]["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-6)
        precision = average_precision_score(truth, score)
        assert part["maps"]["SAR brightness"][kind]["average_precision"] == pytest.approx(precision, abs=1e-6)
        assert part["discrepant_pixels"][kind] == mask.sum()
    assert part["maps"]["variance"]["sar_only"]["auroc"] == 1 and 0.4 < part["maps"]["random"]["eo_only"]["auroc"] < 0.6
    # Errors were drawn with the spread as their σ: as a σ it is calibrated, and as σ² at another scale after scaling too.
    found = {name: part["maps"][name]["calibration"] for name in ("ensemble spread", "variance", "expected error")}
    assert {name: list(kinds) for name, kinds in found.items()} == {
        "ensemble spread": ["squared"], "variance": ["absolute", "squared"], "expected error": ["absolute"]
    }  # fmt: skip
    assert all(calibration["ence"] < 0.1 for kinds in found.values() for calibration in kinds.values())
    assert (
        "calibration" not in part["maps"]["SAR brightness"]
        and abs(part["maps"]["random"]["ranking"]["absolute"]["aurg"]) < 0.05
    )
    row = next(row for row in table_of(scene / "report") if row["name"] == "sub/3")
    ranking = part["maps"]["SAR gradient"]["ranking"]
    cells = [f"{ranking[kind][measure]:.3f}" for kind in ("absolute", "squared") for measure in ("spearman", "ause", "aurg")]
    assert f"| SAR gradient | {' | '.join(cells)} |" in (scene / "report" / "report.md").read_text()
    alone = np.abs(read(scene / "pred/sub/3.png") - read(scene / "gt/sub/3.png")).mean(-1)
    expected = spearmanr(read(scene / "variance/sub/3.tif").ravel(), alone.ravel()).statistic
    assert float(row["variance/spearman_absolute"]) == pytest.approx(expected, abs=1e-6)
    assert "SAR gradient/aurg_squared" in row and "SAR gradient/ence_squared" not in row
    sigma, rms = read(scene / "ensemble/sub/3.tif").ravel(), np.sqrt(per_pixel(scene, "sub/3", 2).ravel())
    assert float(row["ensemble spread/ence_squared"]) == pytest.approx(ence(*reliability(sigma, rms, 2, 20)), rel=1e-4)
    entry = report["means"]["variance"]["ause_squared"]
    assert entry["mean"] == pytest.approx(np.mean([float(r["variance/ause_squared"]) for r in table_of(scene / "report")]))
    assert f"{entry['mean']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]" in (scene / "report" / "report.md").read_text()


def test_maps_are_tiffs_whatever_pictures_lie_beside_them(scene, capsys):
    """test.py --error-dir writes a map and a picture of it; a confidence map is a picture, and no variance."""
    before = run(scene, *everything(scene))["uncertainty"]
    for path in (scene / "error").rglob("*.tif"):
        write(path.with_suffix(".png"), np.zeros((SIDE, SIDE)))
    assert run(scene, *everything(scene), output="with_pictures")["uncertainty"] == before
    argv = ["--pred-dir", str(scene / "pred"), "--gt-dir", str(scene / "gt"), "--variance-dir", str(scene / "sar")]
    assert errors.run(evaluate.main, [*argv, "--no-networks", "--output", str(scene / "refused")]) == 2
    assert "sar: holds no .tif or .tiff, expected a map for each image" in capsys.readouterr().err


def per_pixel(scene: Path, stem: str, power: int) -> np.ndarray:
    """Mean over RGB of |pred - gt| ** power."""
    return (np.abs(read(scene / f"pred/{stem}.png") - read(scene / f"gt/{stem}.png")) ** power).mean(-1)


@pytest.mark.parametrize("kind", ["absolute", "squared"])
def test_the_variance_is_calibrated_up_to_a_scale(kind):
    """20 bins of one pixel: σ = 1 ... 20 against 1 ... 20 times 3, but for the last, whose error is none."""
    sigma = np.arange(1.0, 21)
    error = np.append(3 * sigma[:-1], 0)
    errors_by_name = {"absolute": error, "squared": error**2}
    power = baselines.POWERS[kind]
    scale = (np.mean(error**power) / np.mean(sigma**power)) ** (1 / power)
    expected = (19 * abs(3 / scale - 1) + 1) / 20
    columns = baselines.image_columns({"variance": sigma**2, "SAR brightness": sigma}, errors_by_name)
    assert columns[f"variance/ence_{kind}"] == pytest.approx(expected)
    samples = {"absolute": error, "squared": error**2, "variance": sigma**2}
    part = baselines.pooled_measures([samples], 20)["maps"]["variance"]["calibration"][kind]
    assert part["ence"] == pytest.approx(expected) and np.allclose(part["predicted"], scale * sigma)


def test_what_is_undefined_does_not_cost_the_rest():
    """An error that is the same everywhere ranks nothing, and a mask without a pixel finds nothing: one line each."""
    score = np.arange(100.0)
    sample = {"absolute": np.ones(100), "squared": np.ones(100), "variance": score + 1}
    masks = {"sar_only": score > 89, "eo_only": np.zeros(100, bool)}
    part = baselines.pooled_measures([sample | masks], 100)
    assert part["maps"]["variance"]["sar_only"]["auroc"] == 1 and set(part["maps"]["variance"]) == {"sar_only", "calibration"}
    assert set(part["absent"]) == {"ranking", "eo_only"}
    flat_variance = baselines.pooled_measures([sample | masks | {"variance": np.zeros(100)}], 100)
    assert "the variance is 0 everywhere" in flat_variance["absent"]["variance, calibration"]


def test_trivial_baselines_by_hand():
    sar = np.zeros((15, 15, 3), np.float32)
    sar[:, 8:] = 100
    maps = baselines.trivial_baselines(sar, (15, 15), "a")
    assert (maps["SAR brightness"] == sar[..., 0]).all()
    # A 7 x 7 window at column 7 holds 4 dark and 3 bright columns: mean 300 / 7, deviation 100 sqrt(12) / 7.
    assert maps["SAR local variation"][7, 7] == pytest.approx(math.sqrt(12) / 3, rel=1e-5)
    assert (
        maps["SAR local variation"][7, 0] == 0 and maps["SAR gradient"][7].argmax() in (7, 8) and maps["SAR gradient"][7, 0] < 1
    )
    assert set(baselines.trivial_baselines(None, (2, 3), "a")) == {"random"}
    assert (
        baselines.trivial_baselines(None, (2, 3), "a")["random"] != baselines.trivial_baselines(None, (2, 3), "b")["random"]
    ).all()


def test_pooled_pixels_are_capped_and_drawn_by_the_stem_alone(scene, monkeypatch):
    monkeypatch.setattr(folders, "POOLED_PIXELS", 100 * COUNT)
    part = run(scene, "--variance-dir", str(scene / "variance"))["uncertainty"]
    assert part["pixels"] == 100 * COUNT and part["pixels_per_image"] == 100
    maps = {"a": np.arange(600.0).reshape(20, 30), "b": np.arange(600.0).reshape(20, 30) * 2}
    sample = baselines.draw_pixels(maps, 100, "stem")
    assert len(np.unique(sample["a"])) == 100 and (sample["b"] == 2 * sample["a"]).all()
    assert (baselines.draw_pixels(maps, 100, "stem")["a"] == sample["a"]).all()
    assert (baselines.draw_pixels(maps, 100, "other")["a"] != sample["a"]).any()


# ---- intervals and comparison


def test_bootstrap_intervals_cover_the_normal_theory_and_ignore_what_is_missing():
    values = np.random.default_rng(0).normal(5, 2, (400, 2))
    values[:100, 1] = np.nan
    means = evaluation.resampled_means(values)
    assert means.shape == (evaluation.RESAMPLES, 2)
    for column, n in ((0, 400), (1, 300)):
        kept = values[np.isfinite(values[:, column]), column]
        ends = evaluation.interval(means[:, column])
        half = 1.96 * kept.std() / math.sqrt(n)
        assert ends["low"] == pytest.approx(kept.mean() - half, abs=0.03) and ends["high"] == pytest.approx(
            kept.mean() + half, abs=0.03
        )
    assert evaluation.interval(evaluation.resampled_means(np.full((3, 1), np.nan))[:, 0]) == {"low": None, "high": None}
    assert (evaluation.resampled_means(values)[:, 0] == means[:, 0]).all()
    single = evaluation.resampled_means(np.array([[1.0, np.nan], [2.0, 5.0]]))  # one value does not tell how much it varies
    assert evaluation.interval(single[:, 1]) == {"low": None, "high": None} and set(single[:, 0]) == {1.0, 1.5, 2.0}


def test_the_paired_bootstrap_sees_a_small_steady_gain(scene):
    run(scene)
    for path in (scene / "pred").rglob("*.png"):  # everything a little nearer to the truth
        gt = read(scene / "gt" / path.relative_to(scene / "pred"))
        write(path, gt + 0.9 * (read(path) - gt))
    (scene / "pred" / "0.png").unlink()
    comparison = run(scene, "--baseline", str(scene / "report" / "report.json"), output="better")["comparison"]
    assert comparison["images"] == COUNT - 1 and comparison["images_of_baseline"] == COUNT
    gain = comparison["means"]["standard"]["psnr"]
    first, second = ({r["name"]: float(r["standard/psnr"]) for r in table_of(scene / f)} for f in ("report", "better"))
    assert gain["difference"] == pytest.approx(np.mean([second[name] - first[name] for name in second]))
    assert 0 < gain["low"] < gain["difference"] < gain["high"] and gain["high"] - gain["low"] < 0.3
    assert "Against the baseline" in (scene / "better" / "report.html").read_text()
    (scene / "report" / "metrics.csv").unlink()
    with pytest.raises(UserError, match="expected report.json with metrics.csv beside it"):
        run(scene, "--baseline", str(scene / "report" / "report.json"))


# ---- files


class Checker(HTMLParser):
    """Every tag is closed in order, nothing is loaded from elsewhere; counts tags."""

    def __init__(self):
        super().__init__()
        self.open, self.count = [], {}

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        assert tag not in ("script", "link", "iframe")
        for name, value in attributes:
            assert name not in ("src", "href") or value.startswith("data:")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_html_is_well_formed_and_self_contained(scene):
    for index in range(2):  # a name that would break careless HTML
        for kind in ("pred", "gt", "sar"):
            shutil.copy(scene / kind / "0.png", scene / kind / f"<b>&{index}.png")
    run(scene, *everything(scene))
    text = (scene / "report" / "report.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and checker.count["img"] == 5 + 9 and "b" not in checker.count  # charts and examples
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions[:2] == ["Sparsification, absolute error", "Discard, absolute error"] and captions[4] == "Reliability"
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text):
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert sorted(path.name for path in (scene / "report").iterdir()) == [
        "metrics.csv",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_a_chart_holds_its_lines_under_their_names():
    lines = {"variance (scaled), absolute": ([0, 10], [0, 4]), "oracle": ([0, 5], [3, 1])}
    figure = line_figure(lines, "left out [%]", "error")
    (axes,), (legend,) = figure.axes, figure.legends
    drawn = {line.get_label(): tuple(map(list, line.get_data())) for line in axes.lines}
    assert drawn == lines and [text.get_text() for text in legend.get_texts()] == list(lines)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xlim()[0], axes.get_ylim()[0]) == ("left out [%]", "error", 0, 0)
    assert [line.get_color() == "black" for line in axes.lines] == [False, True]
    picture = line_chart(lines, "x", "y")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    figure.draw_without_rendering()
    assert legend.get_window_extent().x1 <= figure.bbox.x1 and legend.get_window_extent().x0 >= axes.bbox.x1


def test_reports_merge_into_one_table_that_never_mixes_conventions(scene, capsys):
    run(scene, *everything(scene), output="with_maps/test")
    run(scene, output="plain")
    argv = [str(scene / "with_maps/test/report.json"), f"other={scene / 'plain/report.json'}", "--output", str(scene / "R.md")]
    assert table.main(argv) == 0
    text = (scene / "R.md").read_text()
    sections = re.split(r"\n## ", text)
    assert [section.split("\n")[0] for section in sections[1:]] == [
        "standard convention", "paper convention", "Whole sets", "Uncertainty maps and trivial baselines"
    ]  # fmt: skip
    means = json.loads((scene / "plain/report.json").read_text())["means"]
    for section, convention in zip(sections[1:], ("standard", "paper"), strict=False):
        assert f"| other | {COUNT} | {means[convention]['psnr']['mean']:.4f} [" in section
        assert f"| with_maps | {COUNT} |" in section
    assert "| with_maps | ensemble spread | 8 |" in sections[4]
    assert errors.run(table.main, [argv[0], argv[0], "--output", str(scene / "R.md")]) == 2
    assert "a second run called with_maps" in capsys.readouterr().err
    (scene / "plain" / "report.json").write_text("{}")
    assert errors.run(table.main, argv) == 2 and "no report of evaluate.py" in capsys.readouterr().err
