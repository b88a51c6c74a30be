"""evaluate.py end to end on small folders: numbers against independent computations, faults, comparison, report files."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import evaluate
import utils
from cdiffset import errors
from cdiffset.evaluation import baselines, folders
from cdiffset.evaluation import evaluate as evaluation
from cdiffset.evaluation.charts import line_chart, line_figure
from cdiffset.evaluation.uncertainty import ence, reliability

# isort: split
import numpy as np
import pytest
import torch
from files import Page, save_image
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from cdiffset.images import write_tiff
from results import table

COUNT, SIDE = 8, 24
ODD = "sub/<b>&7"  # a name that would break careless HTML
NAMES = ["0", "2", "4", "6", "sub/1", "sub/3", "sub/5", ODD]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """gt/, pred/ (gt with noise of a known σ at each pixel), sar/, variance/, error/, ensemble/ and masks, 8 images each, and
    report/ of all of them => (their folder, the report). Beside the maps of errors lie pictures, as test.py writes them."""
    folder, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    for stem in NAMES:
        gt = rng.integers(60, 190, (SIDE, SIDE, 3))
        scale = rng.uniform(1, 20, (SIDE, SIDE, 1))
        sigma, sar_only = scale[..., 0], scale[..., 0] > 18
        pictures = {
            "gt": gt, "pred": np.clip(gt + rng.normal(0, scale, gt.shape), 0, 255), "sar": rng.integers(0, 256, (SIDE, SIDE)),
            "masks/mask_sar_only": 255 * sar_only, "masks/mask_eo_only": 255 * (rng.random((SIDE, SIDE)) < 0.1) * ~sar_only,
            "error": np.zeros((SIDE, SIDE)),
        }  # fmt: skip
        for kind, pixels in pictures.items():
            save_image(folder / kind / f"{stem}.png", pixels)
        for kind, values in (("variance", sigma**2 * 1e-3), ("error", sigma * math.sqrt(2 / math.pi)), ("ensemble", sigma)):
            write_tiff(folder / kind / f"{stem}.tif", values)
    return folder, run(folder, *everything(folder))


@pytest.fixture
def scene(whole, tmp_path) -> Path:
    """A copy of the folders, to be changed."""
    return shutil.copytree(whole[0], tmp_path / "scene")


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(np.float64)


def arguments(scene: Path, *options, pred="pred", gt="gt", output="report") -> list[str]:
    words = ("--pred-dir", scene / pred, "--gt-dir", scene / gt, "--no-networks", "--output", scene / output, *options)
    return [str(word) for word in words]


def run(scene: Path, *options, code: int = 0, **folders) -> dict:
    assert evaluate.main([*arguments(scene, *options, **folders), "--num-workers", "0"]) == code
    return json.loads((scene / folders.get("output", "report") / "report.json").read_text(), parse_constant=refuse)


def refuse(constant: str):
    raise AssertionError(f"{constant} is no JSON")


def everything(scene: Path) -> list[str]:
    folders = {"sar": "sar", "variance": "variance", "error": "error", "ensemble": "ensemble", "mask": "masks"}
    return [part for option, folder in folders.items() for part in (f"--{option}-dir", str(scene / folder))]


def table_of(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stacked(scene: Path, kind: str, suffix: str = ".png") -> np.ndarray:
    return np.stack([read(scene / kind / f"{name}{suffix}") for name in NAMES])


def refused(argv: list, capsys, command=evaluate.main) -> str:
    """Exit code 2 and one line on stderr, without a progress bar => the line."""
    capsys.readouterr()
    assert errors.run(command, [str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and len(line) < 1000
    return line.removeprefix("error: ")


# ---- pictures


def test_numbers_are_those_of_the_files_in_counting_order(whole):
    (scene, report), rows = whole, table_of(whole[0] / "report")
    assert report["images"] == COUNT and report["sizes"] == {"24 x 24": COUNT} and report["faults"] == {}
    assert [row["name"] for row in rows] == NAMES
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
    assert set(report["absent"]) == {"lpips", "dists", "squeezenet", "fid", "kid", "inception_score", "squeezenet_frechet"}


def test_equal_images_are_infinite_and_swapping_the_folders_changes_nothing(whole, scene):
    backwards = run(scene, pred="gt", gt="pred", output="swapped")["means"]["standard"]
    for metric in ("psnr", "ssim", "scc"):
        assert backwards[metric]["mean"] == pytest.approx(whole[1]["means"]["standard"][metric]["mean"], abs=1e-5)
    same = run(scene, "--variance-dir", scene / "variance", "--sar-dir", scene / "sar", pred="gt", output="same")
    assert same["means"]["standard"]["psnr"] == {"mean": None, "n": 0, "infinite": COUNT, "low": None, "high": None}
    assert same["means"]["standard"]["ssim"]["mean"] == pytest.approx(1, abs=1e-5)
    assert "not all 0" in same["uncertainty"]["absent"]["ranking"] and "identity_collapse" not in same["set"]
    assert "∞" in (scene / "same" / "report.md").read_text()


def test_a_copied_sar_is_warned_about(scene):
    assert run(scene, "--sar-dir", scene / "sar", pred="sar")["set"]["identity_collapse"]["value"] == 0
    assert "the output copies its input" in (scene / "report" / "report.md").read_text()


def test_batches_and_workers_change_nothing(whole, scene):
    assert evaluate.main(arguments(scene, *everything(scene), "--batch-size", 3, "--num-workers", 2)) == 0
    many, one = (flat(json.loads((folder / "report" / "report.json").read_text())) for folder in (scene, whole[0]))
    assert many.keys() == one.keys()
    for path, value in one.items():
        assert path[0] == "inputs" or many[path] == pytest.approx(value, abs=1e-5), path


def flat(node, path=()) -> dict:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        return {path: node}
    return {key: value for name, child in children for key, value in flat(child, (*path, name)).items()}


# ---- what does not fit


def test_every_fault_is_counted_and_named_and_strict_refuses_them(scene, capsys):
    (scene / "pred" / "0.png").unlink()
    (scene / "gt" / "2.png").unlink()
    save_image(scene / "gt" / "4.png", np.pad(read(scene / "gt" / "4.png"), ((2, 2), (2, 2), (0, 0)), constant_values=9))
    save_image(scene / "gt" / "6.png", read(scene / "gt" / "6.png")[:-1])
    (scene / "pred" / "sub" / "1.png").write_bytes(b"\x89PNG")
    (scene / "variance" / "sub" / "3.tif").unlink()
    report = run(scene, "--variance-dir", scene / "variance", code=1)
    faults = report["faults"]
    assert faults["missing"] == ["0"] and faults["extra"] == ["2"] and faults["cropped"] == ["4 (28 x 28 px to 24 x 24 px)"]
    assert faults["size"] == ["6 is 24 x 23 px, the prediction 24 x 24 px"] and "sub/1.png" in faults["unreadable"][0]
    assert faults["beside"] == ["sub/3: no variance file"]
    assert report["images"] == 4 and report["uncertainty"]["images"] == 3
    assert "ground truth without a prediction: 1 (0)" in capsys.readouterr().err
    text = (scene / "report" / "report.md").read_text()
    assert all(line in text for line in ("Predictions without ground truth: 1.", "- sub/3: no variance file"))
    line = refused(arguments(scene, "--strict", output="strict"), capsys)
    assert line.startswith("--strict: ground truth without a prediction: 1 (0); predictions")
    assert not (scene / "strict").exists()


def test_larger_ground_truth_is_cropped_at_its_centre(whole, scene):
    for path in (scene / "gt").rglob("*.png"):
        save_image(path, np.pad(read(path), ((5, 5), (3, 3), (0, 0)), constant_values=255))
    after = run(scene)
    assert after["means"]["standard"] == whole[1]["means"]["standard"] and len(after["faults"]["cropped"]) == COUNT


def test_a_list_chooses_what_counts(scene, capsys):
    def of_list(name: str, text: str) -> list:
        (scene / name).write_text(text)
        return ["--split-list", scene / name]

    report = run(scene, *of_list("list.txt", "data/opt/0.png\n\nsub/3.png\n6\nnowhere.png\n"))
    assert [row["name"] for row in table_of(scene / "report")] == ["0", "6", "sub/3"]
    assert report["faults"] == {"unlisted": ["nowhere.png"]}
    assert run(scene, *of_list("a.csv", "sar,eo\na/1.png,b/2.png\n"))["images"] == 1
    text = 'id,EO_path,SAR_path\n1,"b/2.png",a/1.png\n2,sub/3.png,a/4.png\n'
    assert run(scene, *of_list("b.csv", text))["faults"] == {}
    assert [row["name"] for row in table_of(scene / "report")] == ["2", "sub/3"]
    for text, message in (
        ("y/2.png\nx/2.png\n", "x/2.png and y/2.png would both be 2"),
        ("x.png\n", "no entry is an image of"),
    ):
        assert message in refused(arguments(scene, *of_list("bad.txt", text)), capsys)


BY_HAND, NO_SET = "neither it nor metrics.csv beside it may be changed by hand", '{"images": 1, "set": {}}'


@pytest.mark.parametrize(
    "report, table, message",
    [
        ("[]", "name\n0\n", BY_HAND),
        ('{"images": 1, "set": {"fid": {}}}', "name\n0\n", BY_HAND),
        (NO_SET, "name,standard/psnr\n0,high\n", BY_HAND),
        (NO_SET, "name,standard/psnr\n0\n", BY_HAND),
        (NO_SET, "stem\n0\n", BY_HAND),
        (NO_SET, 'name\n"' + "0" * 200_000, BY_HAND),
        (NO_SET, "name,standard/psnr\nx,1\n", "has none of these images"),
    ],
)
def test_a_baseline_that_does_not_fit_is_refused_before_the_work(whole, tmp_path, capsys, report, table, message):
    (tmp_path / "report.json").write_text(report)
    (tmp_path / "metrics.csv").write_text(table)
    line = refused(arguments(whole[0], "--baseline", tmp_path / "report.json", output=tmp_path / "out"), capsys)
    assert message in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected at least 1, found 0"),
        (["--sar-dir", "/nowhere"], "--sar-dir: there is no folder /nowhere"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not available here"),
        (["--baseline", "/nowhere/report.json"], ".*/nowhere/report.json: No such file"),
        (["--mask-dir", "."], "--mask-dir: it is for maps, expected --variance-dir"),
        (["--max-pixels", "0"], "--max-pixels: expected at least 1, found 0"),
        (["--variance-dir", "sar"], ".*sar: holds no .tif or .tiff, expected a map for each image"),  # a picture is no variance
        (["--pred-dir", "twins"], ".*0.jpg and 0.png differ in the suffix alone"),
        (["--pred-dir", "other"], ".*has a twin"),
        (["--output", "list.txt"], "--output: .*list.txt is a file"),
        (["--output", "list.txt/report"], "--output: cannot write into .*"),
    ],
)
def test_mistakes_are_one_line(whole, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sar").symlink_to(whole[0] / "sar")
    for name in ("twins/0.png", "twins/0.jpg", "other/x.png"):
        save_image(tmp_path / name, np.zeros((9, 9, 3)))
    (tmp_path / "list.txt").write_text("kept")
    line = refused(arguments(whole[0], *([] if "--output" in options else ["--output", "out"]), *options), capsys)
    assert re.match(message, line) and not (tmp_path / "out").exists() and (tmp_path / "list.txt").read_text() == "kept"


# ---- uncertainty


def test_the_maps_are_evaluated_by_the_pooled_pixels_and_per_image(whole):
    scene, report = whole
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
    assert "calibration" not in part["maps"]["SAR brightness"]
    assert abs(part["maps"]["random"]["ranking"]["absolute"]["aurg"]) < 0.05
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
    variation, gradient = maps["SAR local variation"], maps["SAR gradient"]
    assert (maps["SAR brightness"] == sar[..., 0]).all()
    # A 7 x 7 window at column 7 holds 4 dark and 3 bright columns: mean 300 / 7, deviation 100 sqrt(12) / 7.
    assert variation[7, 7] == pytest.approx(math.sqrt(12) / 3, rel=1e-5) and variation[7, 0] == 0
    assert gradient[7].argmax() in (7, 8) and gradient[7, 0] < 1
    first, second = (baselines.trivial_baselines(None, (2, 3), stem) for stem in "ab")
    assert set(first) == {"random"} and (first["random"] != second["random"]).all()


def test_pooled_pixels_are_capped_and_drawn_by_the_stem_alone(scene, monkeypatch):
    monkeypatch.setattr(folders, "POOLED_PIXELS", 100 * COUNT)
    part = run(scene, "--variance-dir", scene / "variance")["uncertainty"]
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
        assert [ends["low"], ends["high"]] == pytest.approx([kept.mean() - half, kept.mean() + half], abs=0.03)
    assert evaluation.interval(evaluation.resampled_means(np.full((3, 1), np.nan))[:, 0]) == {"low": None, "high": None}
    assert (evaluation.resampled_means(values)[:, 0] == means[:, 0]).all()
    single = evaluation.resampled_means(np.array([[1.0, np.nan], [2.0, 5.0]]))  # one value does not tell how much it varies
    assert evaluation.interval(single[:, 1]) == {"low": None, "high": None} and set(single[:, 0]) == {1.0, 1.5, 2.0}


def test_the_paired_bootstrap_sees_a_small_steady_gain(scene, capsys):
    for path in (scene / "pred").rglob("*.png"):  # everything a little nearer to the truth
        gt = read(scene / "gt" / path.relative_to(scene / "pred"))
        save_image(path, gt + 0.9 * (read(path) - gt))
    (scene / "pred" / "0.png").unlink()
    comparison = run(scene, "--baseline", scene / "report" / "report.json", output="better")["comparison"]
    assert comparison["images"] == COUNT - 1 and comparison["images_of_baseline"] == COUNT
    gain = comparison["means"]["standard"]["psnr"]
    first, second = ({r["name"]: float(r["standard/psnr"]) for r in table_of(scene / f)} for f in ("report", "better"))
    assert gain["difference"] == pytest.approx(np.mean([second[name] - first[name] for name in second]))
    assert 0 < gain["low"] < gain["difference"] < gain["high"] and gain["high"] - gain["low"] < 0.3
    assert "Against the baseline" in (scene / "better" / "report.html").read_text()
    (scene / "report" / "metrics.csv").unlink()
    line = refused(arguments(scene, "--baseline", scene / "report" / "report.json"), capsys)
    assert "expected report.json with metrics.csv beside it" in line


# ---- files


def test_the_html_is_well_formed_and_self_contained(whole):
    text = (whole[0] / "report" / "report.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "b"} & set(tags) and ODD in " ".join(page.said)
    links = [found.get(name, "data:") for _, found in page.elements for name in ("src", "href")]
    assert all(link.startswith("data:") for link in links)
    assert len(page.images()) == tags.count("img") == 5 + 9  # charts and examples
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions[:2] == ["Sparsification, absolute error", "Discard, absolute error"] and captions[4] == "Reliability"
    written = sorted(path.name for path in (whole[0] / "report").iterdir())
    assert written == ["metrics.csv", "report.html", "report.json", "report.md"]


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
    plain = run(scene, output="plain")
    (scene / "report").rename(scene / "test")
    argv = [f"with_maps={scene / 'test/report.json'}", str(scene / "plain/report.json"), "--output", str(scene / "R.md")]
    assert table.main(argv) == 0
    sections = re.split(r"\n## ", (scene / "R.md").read_text())
    assert [section.split("\n")[0] for section in sections[1:]] == [
        "standard convention", "paper convention", "Whole sets", "Uncertainty maps and trivial baselines"
    ]  # fmt: skip
    for section, convention in zip(sections[1:], ("standard", "paper"), strict=False):
        same = plain["images_sha256"][:6]  # of both, which are of the same images
        assert f"| plain | {COUNT} | {same} | {plain['means'][convention]['psnr']['mean']:.4f} [" in section
        assert f"| with_maps | {COUNT} | {same} |" in section
    assert "| with_maps | ensemble spread | 8 |" in sections[4]
    assert "a second run called with_maps" in refused([argv[0], *argv], capsys, table.main)
    (scene / "plain" / "report.json").write_text("{}")
    assert "no report of evaluate.py" in refused(argv, capsys, table.main)


def test_dino_similarity_of_the_command_line(scene, monkeypatch, capsys):
    """By a network that says how far the images' means are apart; the real one is compared in test_metrics."""

    class Means(torch.nn.Module):
        def __init__(self, folder):
            super().__init__()
            assert folder == Path("dino")

        def forward(self, generated, eo):
            return 1 - (generated.mean((1, 2, 3)) - eo.mean((1, 2, 3))).abs()

    def unavailable():
        raise utils.MetricUnavailable("not in this test")

    monkeypatch.setattr(utils, "DinoSimilarity", Means)
    for name in ("_load_lpips", "_load_dists", "_load_inception", "_load_inception_score", "_load_squeezenet"):
        monkeypatch.setattr(utils, name, unavailable)
    argv = [word for word in arguments(scene, "--dino-weights", "dino", "--num-workers", 0) if word != "--no-networks"]
    assert evaluate.main(argv) == 0
    report = json.loads((scene / "report/report.json").read_text())
    assert 0 < report["means"]["standard"]["dino"]["mean"] < 1 and report["absent"]["lpips"] == "not in this test"
    assert "| DINO ↑ |" in (scene / "report/report.md").read_text()
    assert "expected no --no-networks" in refused([*argv, "--no-networks"], capsys)
