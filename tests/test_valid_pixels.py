"""Every kind of EO file counts alike, and what is excluded counts nowhere: files, metrics, maps, calibration and audit."""

import csv
import json
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import evaluate
import utils
from cdiffset import errors
from cdiffset.evaluation import evaluate as evaluation
from cdiffset.evaluation import folders
from cdiffset.evaluation.folders import EvaluationFolders, EvaluationPairs

# isort: split
import numpy as np
import pytest
import torch
from files import save_raster
from PIL import Image
from rasterio.enums import ColorInterp
from scipy.ndimage import correlate
from scipy.stats import spearmanr

import calibrate
from cdiffset.auditing.auditor import continued, write_maps
from cdiffset.auditing.report import EXCLUDED, write_findings
from cdiffset.images import read_tiff, read_unstretched_eo, write_tiff
from cdiffset.inference.record import OutputRecord
from cdiffset.pairing import Pair

HEIGHT, WIDTH, COUNT = 40, 32, 3


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 200, (HEIGHT, WIDTH, 3), np.uint8)


def excluded(seed: int = 0) -> np.ndarray:
    """A border and a hole, bool [H, W]."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[: 6 + seed], mask[20:23, 10:12] = True, True
    return mask


def write_raster(path: Path, pixels: np.ndarray, alpha: np.ndarray | None = None, **options) -> None:
    """[H, W, C], with an alpha band of its own."""
    bands = np.moveaxis(pixels if alpha is None else np.dstack([pixels, alpha]), -1, 0)
    if alpha is not None and "driver" not in options:
        options["colours"] = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    save_raster(path, bands, **options)


DEEP = {  # suffix, pixels in 0-255 => what the file holds, its range
    "float 0 to 1": (".tif", lambda p: (p / 255).astype(np.float32), "0,1"),
    "float -1 to 1": (".npy", lambda p: p / 127.5 - 1, "-1,1"),
    "16-bit PNG": (".png", lambda p: p.astype(np.uint16) * 257, "0,65535"),
    "16-bit TIFF": (".tif", lambda p: p.astype(np.uint16) * 10 + 100, "100,2650"),
}


def write_deep(folder: Path, stem: str, kind: str, pixels: np.ndarray) -> None:
    suffix, convert, _ = DEEP[kind]
    path = folder / f"{stem}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    if suffix == ".npy":
        np.save(path, convert(pixels))
    else:
        write_raster(path, convert(pixels), driver="PNG" if suffix == ".png" else "GTiff")


def write_8_bit(folder: Path, seeds: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds):
        Image.fromarray(picture(seed)).save(folder / f"{index}.png")


def run(folder: Path, *options, code: int = 0, output: str = "report") -> dict:
    argv = ["--pred-dir", folder / "pred", "--gt-dir", folder / "gt", "--no-networks", "--num-workers", "0"]
    assert errors.run(evaluate.main, [str(word) for word in (*argv, "--output", folder / output, *options)]) == code
    return json.loads((folder / output / "report.json").read_text())


def rows_of(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------ value ranges
@pytest.fixture
def pictures(tmp_path) -> Path:
    """pred/ and gt/ of 8 bits."""
    write_8_bit(tmp_path / "pred", range(COUNT))
    write_8_bit(tmp_path / "gt", range(10, 10 + COUNT))
    return tmp_path


@pytest.mark.parametrize("kind", DEEP)
def test_the_same_pictures_read_the_same_in_every_kind_of_file(kind, pictures):
    """And an opaque alpha excludes nothing."""
    expected = run(pictures)["means"]
    for index in range(COUNT):
        with_alpha(pictures / "pred" / f"{index}.png", picture(index), excluded() & False)
        write_deep(pictures / "deep", str(index), kind, picture(10 + index))
    report = run(pictures, "--gt-dir", pictures / "deep", "--gt-range", DEEP[kind][2])
    assert report["inputs"]["gt_range"] == DEEP[kind][2]
    assert report["counted"] == {"fraction": 1, "images_with_excluded_pixels": 0}
    assert report["means"]["fraction"].pop("clipped_gt")["mean"] == 0
    for group, metrics in expected.items():
        for metric, entry in metrics.items():
            assert report["means"][group][metric]["mean"] == pytest.approx(entry["mean"], abs=2e-5), metric


@pytest.mark.parametrize(
    "side, kind, options, words",
    [
        ("pred", "float 0 to 1", (), ("pred/0.tif: float32 pixels from 0.15", "to 0.78", "--pred-range LOW,HIGH")),
        ("gt", "16-bit PNG", (), ("gt/0.png: uint16 pixels from 10280 to", "expected 8-bit", "--gt-range LOW,HIGH")),
        ("gt", "float -1 to 1", ("--pred-range", "0,1"), ("pred/0.png: 8-bit pixels", "leave out --pred-range")),
        ("gt", "float 0 to 1", ("--gt-range", "1,0"), ("--gt-range: expected LOW,HIGH with LOW below HIGH", "'1,0'")),
        ("gt", "float 0 to 1", ("--gt-range", "0,inf"), ("--gt-range: expected LOW,HIGH", "'0,inf'")),
        ("gt", "float 0 to 1", ("--gt-range", "1"), ("--gt-range: expected LOW,HIGH", "'1'")),
    ],
)  # fmt: skip
def test_a_range_that_does_not_fit_is_one_line(side, kind, options, words, tmp_path, capsys):
    for name in {"pred", "gt"} - {side}:
        write_8_bit(tmp_path / name, range(1))
    write_deep(tmp_path / side, "0", kind, picture(0))
    argv = ["--pred-dir", str(tmp_path / "pred"), "--gt-dir", str(tmp_path / "gt"), "--output", str(tmp_path / "out" / "x")]
    assert errors.run(evaluate.main, [*argv, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_values_beyond_the_range_are_clipped_and_noted_or_refused(tmp_path):
    pixels = np.linspace(-0.05, 1, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3)
    np.save(tmp_path / "a.npy", pixels)
    read = read_unstretched_eo(tmp_path / "a.npy", (0, 1), "--pred-range")
    assert np.abs(read.pixels - np.clip(pixels, 0, 1) * 255).max() < 1e-4 and read.valid.all()
    assert read.clipped == pytest.approx(np.mean((pixels < 0).any(-1)))
    write_8_bit(tmp_path / "gt", range(1))
    (tmp_path / "pred").mkdir()
    (tmp_path / "a.npy").rename(tmp_path / "pred" / "0.npy")
    run(tmp_path, "--pred-range", "0,1")
    note = f"Warning: {100 * read.clipped:.3g} % of the pixels lie beyond --pred-range 0,1"
    assert note in (tmp_path / "report" / "report.md").read_text()
    np.save(tmp_path / "a.npy", np.linspace(-1, 1, 8 * 9 * 3, dtype=np.float32).reshape(8, 9, 3))
    with pytest.raises(errors.UserError, match="a.npy: values from -1 to 1, of which 50% are beyond --pred-range 0,1"):
        read_unstretched_eo(tmp_path / "a.npy", (0, 1), "--pred-range")


# -------------------------------------------------------------------------------------------------------- excluded pixels
def with_alpha(path: Path, pixels: np.ndarray, out: np.ndarray, mode: str = "RGBA", **options) -> None:
    image = Image.fromarray(np.dstack([pixels, np.where(out, 0, 255).astype(np.uint8)]))
    image.convert(mode).save(path, **options)


def palette(path: Path, pixels: np.ndarray, out: np.ndarray) -> None:
    image = Image.fromarray((pixels[..., 0] // 64 + 1).astype(np.uint8) * ~out)
    image.putpalette([9, 9, 9, 10, 20, 30, 60, 70, 80, 90, 120, 110, 200, 190, 180])
    image.save(path, transparency=0)


def as_float(pixels: np.ndarray, out: np.ndarray, value: float) -> np.ndarray:
    return np.where(out[..., None], np.float32(value), pixels.astype(np.float32))


def without(value: int, pixels: np.ndarray, out: np.ndarray) -> np.ndarray:
    return np.where(out[..., None], value, np.maximum(pixels, value + 1)).astype(np.uint8)


EXCLUDING = {  # file name, how it is written, whether it takes a range
    "PNG with alpha": ("a.png", with_alpha, False),
    "grey PNG with alpha": ("a.png", lambda *a: with_alpha(*a, mode="LA"), False),
    "WebP with alpha": ("a.webp", lambda *a: with_alpha(*a, lossless=True, exact=True), False),
    "palette with transparency": ("a.png", palette, False),
    "GIF": ("a.gif", palette, False),
    "TIFF with alpha": ("a.tif", lambda p, x, out: write_raster(p, x, np.uint8(255) * ~out), False),
    "TIFF with nodata": ("a.tif", lambda p, x, out: write_raster(p, without(0, x, out), nodata=0), False),
    "TIFF with a mask": ("a.tif", lambda p, x, out: write_raster(p, x, mask=~out), False),
    "16-bit PNG with alpha": (
        "a.png", lambda p, x, out: write_raster(p, x.astype(np.uint16), np.uint16(65535) * ~out, driver="PNG"), True
    ),
    "float TIFF with alpha": ("a.tif", lambda p, x, out: write_raster(p, x.astype(np.float32), np.float32(1) * ~out), True),
    "float TIFF with NaN": ("a.tif", lambda p, x, out: write_raster(p, as_float(x, out, np.nan)), True),
    "float TIFF with nodata": ("a.tif", lambda p, x, out: write_raster(p, as_float(x, out, -9999), nodata=-9999), True),
    "array with infinity": ("a.npy", lambda p, x, out: np.save(p, as_float(x, out, -np.inf)), True),
    "array with NaN in one band": (
        "a.npy", lambda p, x, out: np.save(p, np.dstack([x[..., :2], as_float(x, out, np.nan)[..., 2:]])), True
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, side", [*product(EXCLUDING, ["gt"]), ("PNG with alpha", "pred"), ("float TIFF with NaN", "pred")]
)
def test_what_an_image_excludes_does_not_count(kind, side, tmp_path):
    name, write, takes_range = EXCLUDING[kind]
    other = ({"pred", "gt"} - {side}).pop()
    for folder in ("pred", "gt", "sar"):
        (tmp_path / folder).mkdir()
    out, limits = excluded(), (0, 255) if takes_range else None
    write(tmp_path / side / name, picture(1), out)
    Image.fromarray(picture(2)).save(tmp_path / other / "a.png")
    Image.fromarray(picture(3)).save(tmp_path / "sar" / "a.png")
    read = read_unstretched_eo(tmp_path / side / name, limits, "--range")
    assert np.array_equal(read.valid, ~out)
    report = run(tmp_path, "--sar-dir", tmp_path / "sar", *((f"--{side}-range", "0,255") if takes_range else ()))
    values = {side: read.pixels[~out].astype(float), other: picture(2)[~out].astype(float)}  # [n, 3]
    difference = values["pred"] - values["gt"]
    (row,) = rows_of(tmp_path / "report")
    assert float(row["fraction/counted"]) == pytest.approx((~out).mean()) == report["counted"]["fraction"]
    assert float(row["standard/psnr"]) == pytest.approx(10 * math.log10(255**2 / (difference**2).mean()), abs=1e-4)
    assert float(row["8-bit/mae"]) == pytest.approx(np.abs(difference).mean(), rel=1e-5)
    to_sar = np.abs(values["pred"] - picture(3)[~out]).mean()
    ratio = report["set"]["identity_collapse"]["value"]
    assert ratio == pytest.approx(to_sar / np.abs(difference).mean(), rel=1e-5)
    for suffix in ("md", "html"):
        text = (tmp_path / "report" / f"report.{suffix}").read_text()
        assert f"Pixels that count: {100 * (~out).mean():.4g} %. In 1 of 1 images" in text


def test_images_without_a_pixel_that_counts_or_a_declared_range_are_faults_of_their_own(pictures, capsys):
    upper = np.arange(HEIGHT)[:, None] < np.full(WIDTH, 20)
    with_alpha(pictures / "pred" / "1.png", picture(1), upper)
    with_alpha(pictures / "gt" / "1.png", picture(1), ~upper)
    with_alpha(pictures / "gt" / "2.png", picture(1), upper | True)
    Image.fromarray(picture(3)).save(pictures / "gt" / "3.png")
    write_deep(pictures / "pred", "3", "float 0 to 1", picture(3))
    report = run(pictures, code=1)
    assert report["images"] == 1 and report["faults"].keys() == {"empty", "range"}
    assert report["faults"]["empty"] == [f"{stem}: no pixel is valid in both images" for stem in "12"]
    assert "float32" in report["faults"]["range"][0] and "value range is not declared" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- metrics
def independent_ssim(a: np.ndarray, b: np.ndarray, valid: np.ndarray) -> float:
    """Of [H, W, 3] in [0, 1]: Gaussian windows of 11 px, σ = 1.5, reflected at the border (Wang et al., 2004)."""
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    local = []
    for k in range(3):
        x, y = a[..., k], b[..., k]
        mean = lambda values: correlate(values, window, mode="mirror")  # noqa: E731
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        local.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    padded = np.pad(valid, 5, mode="reflect")
    whole = [[padded[i : i + 11, j : j + 11].all() for j in range(valid.shape[1])] for i in range(valid.shape[0])]
    return float(np.mean(local, 0)[np.array(whole)].mean())


def independent_scc(a: np.ndarray, b: np.ndarray, valid: np.ndarray) -> float:
    """Of [H, W, 3]: correlation of the high-passed images in windows of 8 px, 4 before and 3 after, 0 beyond the border."""
    kernel = np.full((3, 3), -1.0)
    kernel[1, 1] = 8
    high = [np.pad(correlate(image, kernel[..., None], mode="reflect"), ((4, 3), (4, 3), (0, 0))) for image in (a, b)]
    seen = np.pad(valid, 1, mode="edge")
    sharp = [[seen[i : i + 3, j : j + 3].all() for j in range(valid.shape[1])] for i in range(valid.shape[0])]
    sharp = np.pad(np.array(sharp), (4, 3), constant_values=True)
    values = []
    for i in range(valid.shape[0]):
        for j in range(valid.shape[1]):
            if not sharp[i : i + 8, j : j + 8].all():
                continue
            for k in range(3):
                x, y = (image[i : i + 8, j : j + 8, k].ravel() for image in high)
                spread = x.std() * y.std()
                values.append(((x - x.mean()) * (y - y.mean())).mean() / spread if spread else 0)
    return float(np.mean(values))


def batch_of(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).float() * 2 - 1


@pytest.mark.parametrize("mask", ["nothing", "border and hole"])
def test_masked_ssim_and_scc_are_those_of_the_windows_of_valid_pixels(mask):
    """Two different masks in one batch, and the excluded pixels themselves change nothing."""
    rng, metrics = np.random.default_rng(5), utils.PairMetrics(with_lpips=False)
    eo = [rng.random((HEIGHT, WIDTH, 3)) for _ in range(2)]
    generated = [np.clip(image + rng.normal(0, 0.1, image.shape), 0, 1) for image in eo]
    valid = np.stack([~excluded(k) | (mask == "nothing") for k in range(2)])
    found = metrics(batch_of(*generated), batch_of(*eo), torch.from_numpy(valid))["standard"]
    for k in range(2):
        assert found["ssim"][k] == pytest.approx(independent_ssim(generated[k], eo[k], valid[k]), abs=2e-5)
        assert found["scc"][k] == pytest.approx(independent_scc(generated[k], eo[k], valid[k]), abs=2e-5)
    changed = [np.where(each[..., None], image, 0.9) for image, each in zip(generated, valid, strict=True)]
    again = metrics(batch_of(*changed), batch_of(*eo), torch.from_numpy(valid))["standard"]
    assert again == {name: pytest.approx(values, abs=1e-6) for name, values in found.items()}


def test_strips_give_what_the_whole_gives(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    eo = torch.rand(1, 3, 523, 30, generator=rng) * 2 - 1
    generated = (eo + 0.2 * torch.randn(eo.shape, generator=rng)).clamp(-1, 1)
    whole = utils.PairMetrics(with_lpips=False)(generated, eo)
    monkeypatch.setattr(utils, "WHOLE_PX", 0)
    by_strips = utils.PairMetrics(with_lpips=False)(generated, eo)
    for convention, metrics in whole.items():
        for name, values in metrics.items():
            assert by_strips[convention][name] == pytest.approx(values, abs=1e-6), (convention, name)


def test_a_metric_without_a_window_of_valid_pixels_is_absent():
    valid = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    valid[0], valid[1, 3, 4] = True, True
    images = batch_of(picture(0) / 255, picture(1) / 255), batch_of(picture(2) / 255, picture(3) / 255)
    metrics = utils.PairMetrics(with_lpips=False)
    values = metrics(*images, valid)["standard"]
    assert values["ssim"][1] is values["scc"][1] is None and math.isfinite(values["psnr"][1])
    assert metrics.absent["ssim"] == metrics.absent["scc"] == "no window of an image is free of excluded pixels"
    rows = utils.image_rows(["a", "b"], {"standard": values})
    assert "standard/ssim" in rows[0] and set(rows[1]) == {"name", "standard/psnr"}


def test_networks_see_the_images_without_excluded_pixels(pictures, monkeypatch):
    class Distance(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3))

    class Features(torch.nn.Module):
        def forward(self, images):
            return [images.mean((2, 3), keepdim=True)]

    def unavailable():
        raise utils.MetricUnavailable("not here")

    for loader, network in (("_load_lpips", Distance), ("_load_dists", Distance), ("_load_inception", Features)):
        monkeypatch.setattr(utils, loader, network)
    monkeypatch.setattr(utils, "_load_inception_score", unavailable)
    with_alpha(pictures / "gt" / "1.png", picture(11), excluded())
    report = evaluation.evaluate_folders(EvaluationFolders(pictures / "pred", pictures / "gt"), pictures / "report")
    mae = np.mean([np.abs(picture(k).astype(float) - picture(10 + k)).mean() for k in (0, 2)])
    assert report["means"]["standard"]["lpips"]["n"] == 2
    assert report["means"]["standard"]["lpips"]["mean"] == pytest.approx(mae / 127.5, rel=1e-5)
    assert report["means"]["standard"]["dists"]["mean"] == pytest.approx(mae / 255, rel=1e-5)
    means = [np.stack([picture(k + first).mean((0, 1)) for k in (0, 2)]).mean(0) for first in (0, 10)]
    assert report["set"]["fid"]["value"] > 0.9 * ((means[0] - means[1]) ** 2).sum() / 255**2
    assert report["set"]["fid"]["n"] == 2 and report["set"]["kid"]["subset_size"] == 2
    assert all(report["absent"][name] == utils.NEEDS_WHOLE for name in ("lpips", "dists", "fid", "kid"))
    assert report["absent"]["inception_score"] == "not here"
    text = (pictures / "report" / "report.md").read_text()
    assert "FID of 2 images is biased" in text and "| FID ↓ | " in text and "(n = 2)" in text


# ------------------------------------------------------------------------------------------------------- maps and scenes
def test_a_scene_as_test_py_writes_it_is_evaluated_by_its_valid_pixels(tmp_path):
    """RGBA with maps that are NaN where it is transparent; a NaN of a map alone costs the maps' measures that pixel alone."""
    rng = np.random.default_rng(0)
    height, width = 560, 140
    out = np.zeros((height, width), bool)
    out[:160] = True
    gt = rng.integers(30, 220, (height, width, 3), np.uint8)
    scale = rng.uniform(1, 20, (height, width))
    pred = np.clip(gt + rng.normal(0, scale[..., None], gt.shape), 0, 255).round().astype(np.uint8)
    for folder in ("pred", "gt", "variance", "sar"):
        (tmp_path / folder).mkdir()
    write_raster(tmp_path / "pred" / "s.tif", pred * ~out[..., None], np.where(out, 0, 255).astype(np.uint8))
    write_raster(tmp_path / "gt" / "s.tif", gt)
    Image.fromarray(gt[..., 0]).save(tmp_path / "sar" / "s.png")
    variance = np.where(out, np.nan, scale**2).astype(np.float32)
    variance[-1, :7] = np.nan
    write_tiff(tmp_path / "variance" / "s.tif", variance)
    report = run(tmp_path, "--variance-dir", tmp_path / "variance", "--sar-dir", tmp_path / "sar")
    (row,) = rows_of(tmp_path / "report")
    error = np.abs(pred.astype(float) - gt).mean(-1)
    known = np.isfinite(variance)
    assert float(row["fraction/counted"]) == pytest.approx(5 / 7) and float(row["8-bit/mae"]) == pytest.approx(
        error[~out].mean()
    )
    assert float(row["fraction/counted_in_maps"]) == known.mean()
    expected = spearmanr(variance[known], error[known]).statistic
    assert float(row["variance/spearman_absolute"]) == pytest.approx(expected, abs=1e-5)
    part = report["uncertainty"]
    assert part["pixels"] == known.sum() and part["mean_error"]["absolute"] == pytest.approx(error[known].mean(), rel=1e-5)
    brightness = spearmanr(gt[..., 0][known], error[known]).statistic
    assert part["maps"]["SAR brightness"]["ranking"]["absolute"]["spearman"] == pytest.approx(brightness, abs=1e-5)
    variance[-1, 0] = np.inf
    write_tiff(tmp_path / "variance" / "s.tif", variance)
    assert "expected finite values from 0" in run(tmp_path, "--variance-dir", tmp_path / "variance")["faults"]["beside"][0]


def test_quicklooks_beside_scenes_are_no_predictions(tmp_path):
    for name in ("a.tif", "a.quicklook.png", "b.png"):
        (tmp_path / name).touch()
    assert set(folders.images_by_stem(tmp_path)) == {"a", "b"}


def test_masks_are_8_bit(pictures):
    write_tiff(pictures / "variance" / "0.tif", np.ones((HEIGHT, WIDTH)))
    for name in folders.MASKS:
        write_deep(pictures / "masks" / f"mask_{name}", "0", "16-bit PNG", picture(0))
    report = run(pictures, "--variance-dir", pictures / "variance", "--mask-dir", pictures / "masks")
    assert "uint16 pixels" in report["faults"]["beside"][0] and "LOW,HIGH" not in report["faults"]["beside"][0]


def test_example_pictures_show_excluded_pixels_grey_and_large_images_reduced(tmp_path):
    for folder in ("pred", "gt", "variance"):
        (tmp_path / folder).mkdir()
    out = excluded()
    with_alpha(tmp_path / "pred" / "a.png", picture(0), out)
    Image.fromarray(picture(1)).save(tmp_path / "gt" / "a.png")
    write_tiff(tmp_path / "variance" / "a.tif", np.where(out, np.nan, picture(2)[..., 0]))
    pairs = EvaluationPairs(EvaluationFolders(tmp_path / "pred", tmp_path / "gt", variance_dir=tmp_path / "variance"))
    scale, step = 128 // WIDTH, 128 + utils.GAP_PX
    shown = evaluation.picture(pairs[0])[utils.TITLE_PX :: scale]
    for column in range(4):  # EO, generated EO, error, variance
        panel = shown[:, column * step : column * step + 128 : scale]
        assert (panel[out] == 128).all() and (panel[~out] != 128).any(-1).mean() > 0.9
    assert np.array_equal(shown[:, :128:scale][~out], picture(1)[~out])
    item = pairs[0] | {"maps": {}}
    for kind in ("eo", "generated"):
        item[kind] = item[kind].repeat(1, 50, 1)
    item["valid"] = item["valid"].repeat(50, 1)
    assert evaluation.picture(item).shape[0] == utils.TITLE_PX + 500  # 2,000 px


# -------------------------------------------------------------------------------------------------- calibration and audit
@pytest.fixture
def one_pair(tmp_path) -> Pair:
    """A grey SAR, and an EO as floats in [0, 1] that is NaN where it does not count."""
    Image.fromarray(picture(0)[..., 0]).save(tmp_path / "sar.png")
    write_raster(tmp_path / "eo.tif", as_float(picture(1) / 255, excluded(), np.nan))
    return Pair("a", tmp_path / "sar.png", tmp_path / "eo.tif")


def network() -> dict:
    return {"checkpoint": SimpleNamespace(factor=4, device=torch.device("cpu"), meta={}), "batch_sizes": lambda *_: 1}


def test_calibration_draws_from_the_pixels_that_count(one_pair, tmp_path, capsys):
    class Translator(SimpleNamespace):
        def __call__(self, images):
            maps = {"variance": np.arange(HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)}
            return [SimpleNamespace(eo=picture(2), uncertainties=maps) for _ in images]

    Image.fromarray(picture(1)[1:]).save(tmp_path / "small.png")
    write_raster(tmp_path / "nan.tif", as_float(picture(1), excluded() | True, np.nan))
    others = [Pair(name, one_pair.sar, tmp_path / name) for name in ("small.png", "nan.tif")]
    drawn, skipped = calibrate.collect(Translator(**network()), [one_pair, *others], 0, (0, 1), 10**6)
    assert list(drawn) == [0] and [pair.name for pair in skipped] == ["small.png", "nan.tif"]
    told = capsys.readouterr().err
    assert "small.png: 8-bit pixels" in told and "nan.tif: no pixel is valid" in told
    counted = ~excluded()
    places = drawn[0].maps["variance"].astype(int)
    assert np.array_equal(np.sort(places), np.flatnonzero(counted)) and drawn[0].counted == counted.mean()
    error = np.abs(picture(2).astype(float) - picture(1)).mean(-1).ravel()
    np.testing.assert_allclose(drawn[0].error, error[places], atol=1e-4)


def test_the_audit_scores_the_pixels_that_count(one_pair, tmp_path):
    seen, residual = [], np.random.default_rng(0).random((HEIGHT, WIDTH)).astype(np.float32)
    residual[excluded()] = 1000

    class Auditor(SimpleNamespace):
        def __call__(self, sar, eo):
            seen.extend(eo)
            return [residual]

    record = OutputRecord(tmp_path / "out" / "maps", {}, skip_existing=False)
    assert write_maps(Auditor(**network()), [one_pair], tmp_path / "out", record, (0, 1), 10**6) == {}
    counted = ~excluded()
    np.testing.assert_allclose(seen[0][counted], picture(1)[counted], atol=1e-4)
    assert np.isfinite(seen[0]).all() and np.array_equal(seen[0][0], seen[0][6])  # continued by the nearest row that counts
    written = read_tiff(tmp_path / "out" / "maps" / "a.tif")
    assert np.array_equal(np.isnan(written), ~counted) and np.array_equal(written[counted], residual[counted])
    (finding,) = write_findings(tmp_path / "out", [one_pair], 5, 10**6, (0, 1))
    assert finding.score == pytest.approx(residual[counted].mean()) and finding.maximum == residual[counted].max()
    assert finding.local == pytest.approx(np.quantile(residual[counted], 0.99)) and finding.counted == counted.mean()
    rows = [y for _, y0, _, y1 in finding.boxes for y in (y0, y1 - 1)]
    assert finding.boxes and min(rows) >= 6
    overlay = np.array(Image.open(tmp_path / "out" / "overlays" / "a.png"))
    scale = overlay.shape[0] // HEIGHT
    eo = overlay[::scale, WIDTH * scale + utils.GAP_PX :: scale][:, :WIDTH]
    assert (eo[~counted] == EXCLUDED).all() and np.abs(eo[counted].astype(int) - picture(1)[counted]).max() <= 1


def test_pixels_are_continued_by_the_nearest_valid_ones():
    pixels, valid = np.arange(12.0).reshape(1, 4, 3), np.array([[False, False, True, True]])
    assert continued(pixels, valid)[0, :, 0].tolist() == [6, 6, 6, 9] and continued(pixels, valid | True) is pixels
