"""The metrics against direct library calls and hand-computed cases, in both conventions; no network."""

import csv
import json
import math
import socket
import sys
import time
import urllib.error

# First of all, because it mends torchvision, which the metric libraries import.
import utils
from utils import CONVENTIONS, MetricUnavailable, PairMetrics

# isort: split
import lpips
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_fid.fid_score import get_activations
from pytorch_fid.inception import InceptionV3
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    spatial_correlation_coefficient,
    structural_similarity_index_measure,
)


def pair(batch: int = 4, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Two related batches [B, 3, size, size] inside [-1, 1]."""
    rng = torch.Generator().manual_seed(0)
    eo = torch.rand(batch, 3, size, size, generator=rng) * 1.6 - 0.8
    return (eo + 0.3 * torch.randn(eo.shape, generator=rng)).clamp(-1, 1), eo


def flat(generated: float, eo: float, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 3, size, size), generated), torch.full((1, 3, size, size), eo)


@pytest.fixture(scope="module")
def random_lpips():
    """LPIPS with its own linear layers on a VGG of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Every download fails, nothing is cached; gives the list of attempts."""
    attempts = []

    def refuse(url, *args, **kwargs):
        attempts.append((url, socket.getdefaulttimeout()))
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    return attempts


def write_images(folder, count: int, seed: int, size: int = 32) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        pixels = rng.integers(0, 256, (size, size, 3)) * rng.uniform(0.2, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.png")


# ---- per-image metrics


def test_a_constant_shift_reads_its_closed_form_psnr():
    values = PairMetrics(with_lpips=False)(*flat(0.2, 0.0))
    assert values["standard"]["psnr"] == pytest.approx([20.0], abs=1e-4)  # a difference of 0.1 on [0, 1]
    assert values["paper"]["psnr"] == pytest.approx([20 * math.log10(5)], abs=1e-4)  # 0.2 on [0, 1]


def test_where_nothing_clamps_the_paper_convention_costs_20_log10_2():
    generated, eo = (images * 0.4 for images in pair())
    values = PairMetrics(with_lpips=False)(generated, eo)
    difference = np.subtract(values["standard"]["psnr"], values["paper"]["psnr"])
    np.testing.assert_allclose(difference, 20 * math.log10(2), atol=1e-4)


def test_the_paper_convention_does_not_see_differences_beyond_its_clamp():
    values = PairMetrics(with_lpips=False)(*flat(0.9, 0.6))
    assert values["standard"]["psnr"] == pytest.approx([-20 * math.log10(0.15)], abs=1e-4)
    assert values["paper"]["psnr"] == [math.inf] and values["paper"]["ssim"] == pytest.approx([1.0])
    values = PairMetrics(with_lpips=False)(*flat(0.9, 0.4))  # clamped to 1 against 0.9
    assert values["paper"]["psnr"] == pytest.approx([20.0], abs=1e-4)


def test_generated_images_are_clamped_to_their_range():
    values = PairMetrics(with_lpips=False)(*flat(7.0, 0.8))
    assert values["standard"]["psnr"] == pytest.approx([20.0], abs=1e-4)


def test_values_are_per_image_and_equal_to_direct_library_calls_at_batch_1():
    generated, eo = pair()
    values = PairMetrics(with_lpips=False)(generated, eo)
    images = {
        "standard": (generated * 0.5 + 0.5, eo * 0.5 + 0.5),
        "paper": (torch.clamp(generated + 0.5, 0, 1), torch.clamp(eo + 0.5, 0, 1)),
    }
    assert set(values) == set(CONVENTIONS) == set(images)
    for convention, (a, b) in images.items():
        singles = [(a[i : i + 1], b[i : i + 1]) for i in range(4)]
        expected = {
            "psnr": [peak_signal_noise_ratio(x, y, data_range=1.0).item() for x, y in singles],
            "ssim": [structural_similarity_index_measure(x, y, data_range=1.0).item() for x, y in singles],
            "scc": [spatial_correlation_coefficient(x, y).item() for x, y in singles],
        }
        assert set(values[convention]) == set(expected)
        for metric, per_image in expected.items():
            assert values[convention][metric] == pytest.approx(per_image, abs=1e-5), (convention, metric)
    assert values["paper"]["ssim"] != pytest.approx(values["standard"]["ssim"], abs=1e-3)


def test_batch_4_equals_four_batches_of_1(random_lpips):
    generated, eo = pair()
    metrics = PairMetrics(lpips_model=random_lpips)
    together = metrics(generated, eo)
    alone = [metrics(generated[i : i + 1], eo[i : i + 1]) for i in range(4)]
    for convention in CONVENTIONS:
        assert set(together[convention]) == {"psnr", "ssim", "scc", "lpips"}
        for metric, values in together[convention].items():
            assert values == pytest.approx([one[convention][metric][0] for one in alone], abs=1e-5)
    assert metrics.absent == {}


def test_symmetry_and_identity(random_lpips):
    generated, eo = pair(batch=2)
    metrics = PairMetrics(lpips_model=random_lpips)
    forwards, backwards, same = metrics(generated, eo), metrics(eo, generated), metrics(eo, eo.clone())
    for convention in CONVENTIONS:
        for metric, values in forwards[convention].items():
            assert backwards[convention][metric] == pytest.approx(values, abs=1e-5)
        assert same[convention]["psnr"] == [math.inf] * 2
        assert same[convention]["ssim"] == pytest.approx([1, 1], abs=1e-5)
        assert same[convention]["lpips"] == [0, 0]


def test_lpips_is_fed_with_each_conventions_own_range(random_lpips):
    generated, eo = pair(batch=2)
    values = PairMetrics(lpips_model=random_lpips)(generated, eo)
    with torch.no_grad():
        standard = random_lpips(generated, eo).flatten().tolist()
        paper = random_lpips((generated + 0.5).clamp(0, 1), (eo + 0.5).clamp(0, 1), normalize=False).flatten().tolist()
    assert values["standard"]["lpips"] == pytest.approx(standard, abs=1e-6)
    assert values["paper"]["lpips"] == pytest.approx(paper, abs=1e-6)
    assert standard != pytest.approx(paper, abs=1e-4)


def test_half_precision_images_are_measured_in_float32():
    generated, eo = (images.bfloat16() for images in pair(batch=1))
    metrics = PairMetrics(with_lpips=False)
    assert metrics(generated, eo) == metrics(generated.float(), eo.float())


def test_images_too_small_for_a_metric_leave_it_absent_with_the_reason():
    metrics = PairMetrics(with_lpips=False)
    assert set(metrics(*pair(batch=1, size=7))["standard"]) == {"psnr", "ssim"}
    assert metrics.absent["scc"] == "needs sides of at least 8 px, an image has 7 x 7"
    assert set(metrics(*pair(batch=1, size=5))["paper"]) == {"psnr"}
    assert metrics.absent["lpips"] == "switched off"


def test_minimal_sizes_are_the_libraries_own(random_lpips):
    metrics = PairMetrics(lpips_model=random_lpips)
    for metric, side in utils.MIN_SIDE_PX.items():
        assert math.isfinite(metrics(*pair(batch=1, size=side))["standard"][metric][0])
    assert math.isfinite(metrics(*pair(batch=1, size=16))["paper"]["lpips"][0])


@pytest.mark.parametrize(
    ("generated", "eo", "message"),
    [
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9), r"\[B, 3, H, W\]"),
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), r"\[B, 3, H, W\]"),
        (torch.full((1, 3, 8, 8), math.nan), torch.zeros(1, 3, 8, 8), "finite"),
        (torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 255.0), r"\[-1, 1\], got 255"),
    ],
)
def test_images_that_cannot_be_meant_are_refused(generated, eo, message):
    with pytest.raises(ValueError, match=message):
        PairMetrics(with_lpips=False)(generated, eo)


def test_lpips_without_its_weights_is_absent_tried_once_and_the_rest_is_computed(offline):
    started = time.perf_counter()
    metrics = PairMetrics()
    for _ in range(3):
        assert set(metrics(*pair(batch=1))["standard"]) == {"psnr", "ssim", "scc"}
    assert time.perf_counter() - started < 20
    assert [timeout for _, timeout in offline] == [utils.CONNECT_TIMEOUT_S] and socket.getdefaulttimeout() is None
    assert "Name or service not known" in metrics.absent["lpips"] and "\n" not in metrics.absent["lpips"]


def test_lpips_without_its_library_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "ModuleNotFoundError" in PairMetrics().absent["lpips"]


# ---- metrics of a set of images


@pytest.fixture
def random_inception(monkeypatch):
    """pytorch-fid's network with random weights, its first pooling (64-d) as features: the matrix root of 2048-d is slow."""

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torchvision.models.inception_v3(num_classes=10, aux_logits=False, weights=None, init_weights=False)

    monkeypatch.setattr("pytorch_fid.inception.fid_inception_v3", build)
    monkeypatch.setattr(utils, "FID_DIMS", 64)


def features(folder) -> np.ndarray:
    """pytorch-fid's own activations [n, 64]."""
    return get_activations(sorted(folder.glob("*.png")), InceptionV3([0]), batch_size=1, dims=64, num_workers=0)


def test_fid_is_the_frechet_distance_of_pytorch_fids_activations(random_inception, tmp_path):
    write_images(tmp_path / "a", 5, seed=1)
    write_images(tmp_path / "b", 6, seed=2)
    a, b = features(tmp_path / "a"), features(tmp_path / "b")
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # Tr sqrt(Ca Cb) is the nuclear norm of the product of two square-root factors of the covariances.
    factor_a, factor_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    trace_root = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root
    measured = utils.fid(tmp_path / "a", tmp_path / "b")
    assert measured == pytest.approx(expected, rel=1e-3) and measured > 0
    assert utils.fid(tmp_path / "b", tmp_path / "a") == pytest.approx(measured, rel=1e-3)
    assert utils.fid(tmp_path / "a", tmp_path / "a") == pytest.approx(0, abs=1e-3 * expected)


def test_fid_finds_images_in_subfolders_and_of_different_sizes(random_inception, tmp_path):
    write_images(tmp_path / "nested" / "x", 3, seed=1)
    write_images(tmp_path / "nested" / "y", 2, seed=2, size=24)
    write_images(tmp_path / "b", 5, seed=3)
    assert utils.fid(tmp_path / "nested", tmp_path / "b") > 0


def test_fid_uses_inceptions_pool3(monkeypatch, tmp_path):
    asked_for = []

    class Recorder:
        BLOCK_INDEX_BY_DIM = {2048: 3}

        def __init__(self, output_blocks):
            asked_for.append(output_blocks)
            raise OSError("seen enough")

    monkeypatch.setattr("pytorch_fid.inception.InceptionV3", Recorder)
    write_images(tmp_path / "a", 2, seed=1)
    with pytest.raises(MetricUnavailable, match="seen enough"):
        utils.fid(tmp_path / "a", tmp_path / "a")
    assert asked_for == [[3]]


@pytest.fixture
def colour_classifier(monkeypatch):
    """In place of Inception: logits [B, 3] from the mean colour."""

    class MeanColour(torch.nn.Module):
        def __init__(self, **kwargs):
            super().__init__()

        def forward(self, images):
            assert images.dtype == torch.uint8
            return images.float().mean((2, 3)) / 25

    monkeypatch.setattr("torchmetrics.image.inception.NoTrainInceptionV3", MeanColour)


def test_inception_score_is_the_mean_over_splits_and_leaves_the_global_generator_alone(colour_classifier, tmp_path):
    write_images(tmp_path, 20, seed=1)
    state = torch.get_rng_state()
    score = utils.inception_score(tmp_path)
    assert utils.inception_score(tmp_path) == score and torch.equal(torch.get_rng_state(), state)
    images = [np.asarray(Image.open(path), np.float64) for path in sorted(tmp_path.glob("*.png"))]
    p = np.array([np.exp(image.mean((0, 1)) / 25) for image in images])
    p /= p.sum(1, keepdims=True)
    shuffled = p[torch.randperm(20, generator=torch.Generator().manual_seed(0)).numpy()]
    by_split = [np.exp((s * np.log(s / s.mean(0))).sum(1).mean()) for s in np.split(shuffled, 10)]
    assert score == pytest.approx(np.mean(by_split), rel=1e-5)


def test_sets_that_are_too_small_or_missing_are_absent_with_the_reason(tmp_path):
    write_images(tmp_path / "a", 10, seed=1)
    values, absent = utils.set_metrics(tmp_path / "a", tmp_path / "missing")
    assert values == {} and set(absent) == {"fid", "inception_score"}
    assert absent["fid"].startswith("needs at least 2 PNG images") and "missing has 0" in absent["fid"]
    assert absent["inception_score"].startswith("needs more than 10 PNG images")


def test_set_metrics_without_weights_are_absent_with_the_reason(offline, tmp_path):
    write_images(tmp_path / "a", 11, seed=1)
    values, absent = utils.set_metrics(tmp_path / "a", tmp_path / "a")
    assert values == {} and set(absent) == {"fid", "inception_score"} and len(offline) == 2
    assert all("Name or service not known" in reason and "\n" not in reason for reason in absent.values())


def test_set_metrics_hands_on_what_was_computed(random_inception, colour_classifier, tmp_path):
    write_images(tmp_path / "a", 11, seed=1)
    write_images(tmp_path / "b", 11, seed=2)
    values, absent = utils.set_metrics(tmp_path / "a", tmp_path / "b")
    assert absent == {} and values["fid"] > 0 and values["inception_score"] >= 1


# ---- reports


def rows_of_two_batches() -> list[dict]:
    """Three images: one of them too small for SSIM, one equal to its EO."""
    first = {"standard": {"psnr": [10.0, math.inf], "ssim": [0.5, 1.0]}, "paper": {"psnr": [4.0, math.inf], "ssim": [0.3, 1.0]}}
    second = {"standard": {"psnr": [20.0]}, "paper": {"psnr": [math.inf]}}
    return utils.image_rows(["a", "b"], first) + utils.image_rows(["c"], second)


def test_means_are_over_images_not_batches_and_count_what_they_leave_out():
    summary = utils.summarise(rows_of_two_batches())
    assert summary["standard"]["psnr"] == {"mean": 15.0, "n": 2, "infinite": 1}
    assert summary["standard"]["ssim"] == {"mean": 0.75, "n": 2, "infinite": 0}
    assert summary["paper"]["psnr"] == {"mean": 4.0, "n": 1, "infinite": 2}
    assert utils.summarise([]) == {}
    assert utils.flat_means(rows_of_two_batches())["standard/psnr"] == 15.0
    assert utils.flat_means(utils.image_rows(["a"], {"paper": {"psnr": [math.inf]}})) == {"paper/psnr": math.inf}


def test_a_report_is_valid_labelled_and_names_what_is_absent(tmp_path):
    absent = {"lpips": "no weights", "ssim": "needs sides of at least 6 px, an image has 5 x 5"}
    report = utils.write_report(tmp_path / "run", rows_of_two_batches(), {"fid": 18.15}, absent)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.csv", "report.json", "report.md"]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    loaded = json.loads((tmp_path / "run" / "report.json").read_text(), parse_constant=refuse)
    assert loaded == report and loaded["images"] == 3 and loaded["absent"] == absent and loaded["set"] == {"fid": 18.15}

    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == ["a", "b", "c"]
    assert [row["standard/psnr"] for row in table] == ["10.0", "inf", "20.0"]
    assert [row["paper/ssim"] for row in table] == ["0.3", "1.0", ""]

    text = (tmp_path / "run" / "report.md").read_text()
    assert "| metric | standard | paper |" in text
    assert "| PSNR [dB] ↑ | 15.0000 (n = 2, 1 infinite) | 4.0000 (n = 1, 2 infinite) |" in text
    assert "| FID ↓ | 18.1500 |" in text and "FID of 3 images is biased" in text
    assert "- LPIPS: no weights" in text


def test_a_report_of_equal_images_only_is_still_valid(tmp_path):
    rows = utils.image_rows(["a"], {"standard": {"psnr": [math.inf]}})
    report = utils.write_report(tmp_path, rows, {}, {})
    assert report["means"]["standard"]["psnr"] == {"mean": None, "n": 0, "infinite": 1}
    assert "∞ (n = 0, 1 infinite)" in (tmp_path / "report.md").read_text()


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    utils.write_report(tmp_path, rows_of_two_batches(), {}, {})
    before = {path: path.read_text() for path in tmp_path.iterdir()}

    def fail(*paths):
        raise OSError("disk gone")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        utils.write_report(tmp_path, rows_of_two_batches()[:1], {}, {})
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


# ---- panels


def test_panel_places_pictures_side_by_side_in_8_bit():
    eo = torch.stack([torch.full((8, 6), value) for value in (-1.0, 0.0, 1.0)])
    confidence = torch.full((1, 8, 6), 0.5)
    picture = utils.panel([eo, confidence])
    assert picture.shape == (8, 12 + utils.GAP_PX, 3) and picture.dtype == np.uint8
    assert (picture[:, :6] == [0, 128, 255]).all() and (picture[:, -6:] == 128).all()
    assert (picture[:, 6:-6] == 255).all()


def test_panel_titles_stand_above_their_own_column():
    black = torch.full((3, 20, 64), -1.0)
    picture = utils.panel([black, black], titles=["SAR", ""])
    assert picture.shape == (20 + utils.TITLE_PX, 128 + utils.GAP_PX, 3)
    header = picture[: utils.TITLE_PX]
    assert header[:, :64].min() < 100 and (header[:, 64:] == 255).all()
    assert (picture[utils.TITLE_PX :, :64] == 0).all()
