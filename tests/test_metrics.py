"""The metrics against direct library calls and hand-computed cases, in both conventions; no network."""

import math
import socket
import sys
import time
import urllib.error
from pathlib import Path

# First of all, because it mends torchvision, which the metric libraries import.
import utils
from cdiffset.errors import UserError
from cdiffset.images import read_eo, to_tensor
from cdiffset.pipeline import to_uint8
from utils import CONVENTIONS, MetricUnavailable, PairMetrics, SetMetrics

# isort: split
import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import REPO
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance, get_activations
from pytorch_fid.inception import InceptionV3
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image import (
    deep_image_structure_and_texture_similarity,
    peak_signal_noise_ratio,
    spatial_correlation_coefficient,
    structural_similarity_index_measure,
)
from transformers import DINOv3ViTConfig, DINOv3ViTModel


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


@pytest.fixture(scope="module")
def random_dists():
    """DISTS with its own weights of the features, on a VGG of random weights."""
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr("torchmetrics.functional.image.dists.vgg16", lambda weights: torchvision.models.vgg16(weights=None))
        return utils._load_dists()


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    """A DINOv3 ViT of two layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=1, pos_embed_rescale=None))
    model.save_pretrained(folder := tmp_path_factory.mktemp("dino"))
    return folder


@pytest.fixture
def pair_metrics(monkeypatch):
    """PairMetrics with the given networks in place of those that are downloaded."""

    def make(lpips: torch.nn.Module | None = None, dists: torch.nn.Module | None = None, **options) -> PairMetrics:
        monkeypatch.setattr(utils, "_load_lpips", lambda: lpips)
        monkeypatch.setattr(utils, "_load_dists", lambda: dists)
        return PairMetrics(with_lpips=lpips is not None, with_dists=None if dists is None else True, **options)

    return make


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


def eight_bit(count: int, seed: int, size: int = 32) -> torch.Tensor:
    """Images [count, 3, size, size] in [-1, 1] whose values 8 bits hold."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3, size, size)) * rng.uniform(0.2, 1, (count, 1, 1, 1))
    return torch.from_numpy(pixels.astype(np.uint8)).float() / 127.5 - 1


# ---- per-image metrics


@pytest.mark.parametrize(
    ("generated", "eo", "standard", "paper"),
    [
        (0.2, 0.0, 20.0, 20 * math.log10(5)),  # a difference of 0.1 and of 0.2 on [0, 1]
        (0.9, 0.6, -20 * math.log10(0.15), math.inf),  # no difference beyond the paper's clamp
        (0.9, 0.4, -20 * math.log10(0.25), 20.0),  # clamped to 1 against 0.9
        (7.0, 0.8, 20.0, math.inf),  # a generated image beyond its range is clamped to it
    ],
)
def test_constant_images_read_their_closed_form_psnr(generated, eo, standard, paper):
    values = PairMetrics(with_lpips=False)(*flat(generated, eo))
    assert values["standard"]["psnr"] == pytest.approx([standard], abs=1e-4)
    assert values["paper"]["psnr"] == pytest.approx([paper], abs=1e-4)


def in_conventions(*images: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    return {"standard": [x * 0.5 + 0.5 for x in images], "paper": [torch.clamp(x + 0.5, 0, 1) for x in images]}


def test_values_are_per_image_and_equal_to_direct_library_calls_at_batch_1():
    generated, eo = pair()
    values = PairMetrics(with_lpips=False)(generated, eo)
    images = in_conventions(generated, eo)
    assert set(values) == set(CONVENTIONS) == set(images)
    for convention, (a, b) in images.items():
        singles = list(zip(a.split(1), b.split(1), strict=True))
        expected = {
            "psnr": [peak_signal_noise_ratio(x, y, data_range=1.0).item() for x, y in singles],
            "ssim": [structural_similarity_index_measure(x, y, data_range=1.0).item() for x, y in singles],
            "scc": [spatial_correlation_coefficient(x, y).item() for x, y in singles],
        }
        assert values[convention] == {metric: pytest.approx(each, abs=1e-5) for metric, each in expected.items()}
    assert values["paper"]["ssim"] != pytest.approx(values["standard"]["ssim"], abs=1e-3)


def test_networks_values_are_theirs_at_batch_1_in_each_conventions_range(pair_metrics, random_lpips, random_dists, monkeypatch):
    generated, eo = pair(batch=2)
    metrics = pair_metrics(random_lpips, random_dists)
    values, alone = metrics(generated, eo), [metrics(generated[i : i + 1], eo[i : i + 1]) for i in range(2)]
    backwards, same = metrics(eo, generated), metrics(eo, eo.clone())
    monkeypatch.setattr("torchmetrics.functional.image.dists.DISTSNetwork", lambda: random_dists)
    for convention, (a, b) in in_conventions(generated, eo).items():
        found = values[convention]
        assert set(found) == {"psnr", "ssim", "scc", "lpips", "dists"} and metrics.absent == {}
        for metric, each in found.items():
            assert each == pytest.approx([one[convention][metric][0] for one in alone], abs=1e-5)
            assert each == pytest.approx(backwards[convention][metric], abs=1e-5)
        with torch.no_grad():
            expected = random_lpips(generated, eo) if convention == "standard" else random_lpips(a, b, normalize=False)
        assert found["lpips"] == pytest.approx(expected.flatten().tolist(), abs=1e-6)
        assert found["dists"] == pytest.approx(deep_image_structure_and_texture_similarity(a, b).tolist(), abs=1e-5)
        assert same[convention]["psnr"] == [math.inf] * 2 and same[convention]["lpips"] == [0, 0]
        assert same[convention]["ssim"] == pytest.approx([1, 1], abs=1e-5)
        assert same[convention]["dists"] == pytest.approx([0, 0], abs=1e-4)
    for metric in ("lpips", "dists"):
        assert values["standard"][metric] != pytest.approx(values["paper"][metric], abs=1e-4)


def test_half_precision_images_are_measured_in_float32():
    generated, eo = (images.bfloat16() for images in pair(batch=1))
    metrics = PairMetrics(with_lpips=False)
    assert metrics(generated, eo) == metrics(generated.float(), eo.float())


def test_dino_is_the_cosine_of_the_class_tokens_in_each_conventions_range(dino):
    generated, eo = pair(size=48)
    found, model = PairMetrics(with_lpips=False, dino=dino)(generated, eo), DINOv3ViTModel.from_pretrained(dino).eval()
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)))
    for name, convention in CONVENTIONS.items():
        for index in range(len(eo)):
            with torch.no_grad():
                a, b = (
                    model((convention.pixels(each[index]) - mean)[None] / std).last_hidden_state[0, 0].double()
                    for each in (generated, eo)
                )
            assert found[name]["dino"][index] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
    assert PairMetrics(with_lpips=False, dino=dino)(eo, eo)["standard"]["dino"] == pytest.approx([1] * len(eo), abs=1e-5)


def test_what_is_no_dino_is_refused_in_one_line(dino, tmp_path):
    def refusal() -> str:
        with pytest.raises(UserError, match=f"--dino-weights: {tmp_path}: expected a DINOv3 ViT") as refused:
            PairMetrics(with_lpips=False, dino=tmp_path)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    refusal()  # an empty folder
    tensors = load_file(dino / "model.safetensors")
    tensors.pop("norm.weight")
    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert "1 missing keys" in refusal()


def test_images_too_small_for_a_metric_leave_it_absent_with_the_reason(pair_metrics, random_lpips, random_dists, dino):
    metrics = PairMetrics(with_lpips=False)
    assert set(metrics(*pair(batch=1, size=7))["standard"]) == {"psnr", "ssim"}
    assert metrics.absent["scc"] == "needs sides of at least 8 px, an image has 7 x 7"
    assert set(metrics(*pair(batch=1, size=5))["paper"]) == {"psnr"}
    assert metrics.absent["lpips"] == "switched off"
    for metric, side in utils.MIN_SIDE_PX.items():  # which is enough for the library
        values = pair_metrics(random_lpips, random_dists, with_squeezenet=True, dino=dino)(*pair(batch=1, size=side))
        assert math.isfinite(values["standard"][metric][0]) and math.isfinite(values["paper"][metric][0])


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


def test_networks_without_their_weights_or_library_are_absent_tried_once_and_the_rest_is_computed(offline, monkeypatch):
    started = time.perf_counter()
    metrics = PairMetrics()
    for _ in range(3):
        assert set(metrics(*pair(batch=1))["standard"]) == {"psnr", "ssim", "scc"}
    assert time.perf_counter() - started < 20
    assert [timeout for _, timeout in offline] == [utils.CONNECT_TIMEOUT_S] and socket.getdefaulttimeout() is None
    assert "Name or service not known" in metrics.absent["lpips"] and "\n" not in metrics.absent["lpips"]
    assert "Name or service not known" in PairMetrics(with_lpips=False, with_dists=True).absent["dists"] and len(offline) == 2
    assert PairMetrics(with_lpips=False, with_dists=False).absent["dists"] == "switched off"
    assert "dists" not in PairMetrics(with_lpips=False).absent
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "ModuleNotFoundError" in PairMetrics().absent["lpips"]


# ---- metrics of a set of images


@pytest.fixture(scope="module")
def inception_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.inception_v3(num_classes=10, aux_logits=False, weights=None, init_weights=False)


@pytest.fixture
def random_inception(inception_weights, monkeypatch):
    """pytorch-fid's network with random weights, its first pooling (64-d) as features: the matrix root of 2048-d is slow."""
    monkeypatch.setattr("pytorch_fid.inception.fid_inception_v3", lambda: inception_weights)
    monkeypatch.setattr(utils, "FID_DIMS", 64)


def measured(generated: torch.Tensor, eo: torch.Tensor, batch_size: int = 4) -> SetMetrics:
    metrics = SetMetrics()
    for a, b in zip(generated.split(batch_size), eo.split(batch_size), strict=True):
        metrics.update(a, b)
    return metrics


def features(images: torch.Tensor, folder) -> np.ndarray:
    """pytorch-fid's own activations [n, 64] of the images as files."""
    folder.mkdir()
    paths = [folder / f"{index:03d}.png" for index in range(len(images))]
    for path, pixels in zip(paths, to_uint8(images), strict=True):
        Image.fromarray(pixels).save(path)
    return get_activations(paths, InceptionV3([0]), batch_size=1, dims=64, num_workers=0)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of features [n, d], Tr √(Ca Cb) from the eigenvalues of the product, which are those of a matrix that is not negative."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    trace_root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root


def test_fid_is_the_frechet_distance_of_pytorch_fids_activations_of_the_files(random_inception, no_score, tmp_path):
    first, second = eight_bit(5, seed=1), eight_bit(5, seed=2)
    expected = frechet_distance(features(first, tmp_path / "a"), features(second, tmp_path / "b"))
    fid = measured(first, second).compute()["fid"]["value"]
    assert fid == pytest.approx(expected, rel=1e-3) and fid > 0
    assert measured(second, first).compute()["fid"]["value"] == pytest.approx(fid, rel=1e-3)
    assert measured(first, first).compute()["fid"]["value"] == pytest.approx(0, abs=1e-9 * expected)


@pytest.mark.parametrize("count", [20, 300])  # fewer images than features, and more
def test_the_frechet_distance_is_that_of_eigenvalues_and_of_pytorch_fid(count):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(50, 50))
    first, second = (rng.normal(shift, 1, (count + shift, 50)) @ mixing for shift in (0, 1))
    distance = utils.frechet_distance(first, second)
    assert distance == pytest.approx(frechet_distance(first, second), rel=1e-6)
    moments = [moment for x in (first, second) for moment in (x.mean(0), np.cov(x, rowvar=False))]
    try:
        theirs = calculate_frechet_distance(*moments)
    except TypeError:  # SciPy from 1.18 no longer has the argument that pytorch-fid 0.3.0 gives
        return
    assert distance == pytest.approx(theirs, rel=1e-6)


def unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy with the kernel (x y / d + 1)^3, without the diagonals."""
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    n = len(a)
    within = [(kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (a, b)]
    return sum(within) - 2 * kernel(a, b).mean()


@pytest.mark.parametrize("subsets, size", [(7, 4), (7, 10)])  # a set that is smaller than a subset is taken as a whole
def test_kid_is_the_seeded_mean_of_the_unbiased_discrepancy(random_inception, no_score, monkeypatch, tmp_path, subsets, size):
    monkeypatch.setattr(utils, "KID_SUBSETS", subsets)
    monkeypatch.setattr(utils, "KID_SUBSET_SIZE", size)
    first, second = eight_bit(6, seed=1), eight_bit(6, seed=2)
    state = torch.get_rng_state()
    metrics = measured(first, second)
    kid = metrics.compute()["kid"]
    assert torch.equal(torch.get_rng_state(), state) and metrics.compute()["kid"] == kid
    a, b = features(first, tmp_path / "a"), features(second, tmp_path / "b")
    if size > 6:
        assert kid == {"value": pytest.approx(unbiased_mmd(a, b), rel=1e-4), "subsets": 1, "subset_size": 6}
        return
    rng, values = torch.Generator().manual_seed(0), []
    for _ in range(subsets):
        of_eo, of_generated = (torch.randperm(6, generator=rng)[:size].numpy() for _ in range(2))
        values.append(unbiased_mmd(a[of_generated], b[of_eo]))
    mean, std = (pytest.approx(function(values), rel=1e-4) for function in (np.mean, np.std))
    assert kid == {"value": mean, "std": std, "subsets": subsets, "subset_size": size}


def test_set_metrics_depend_neither_on_batches_nor_on_sizes_being_mixed(random_inception, colour_classifier):
    first, second = eight_bit(11, seed=1), eight_bit(11, seed=2)
    metrics = measured(first, second, batch_size=11)
    values, alone = metrics.compute(), measured(first, second, batch_size=1).compute()
    assert set(values) == {"fid", "kid", "inception_score", "squeezenet_frechet"} and metrics.absent == {}
    for metric in values:
        assert alone[metric]["value"] == pytest.approx(values[metric]["value"], rel=1e-4)
    metrics.update(eight_bit(2, seed=3, size=24), eight_bit(2, seed=4, size=24))
    assert metrics.compute()["fid"]["value"] > 0


def test_fid_uses_inceptions_pool3(monkeypatch, no_score):
    asked_for = []

    class Recorder:
        BLOCK_INDEX_BY_DIM = {2048: 3}

        def __init__(self, output_blocks):
            asked_for.append(output_blocks)
            raise OSError("seen enough")

    monkeypatch.setattr("pytorch_fid.inception.InceptionV3", Recorder)
    assert "seen enough" in SetMetrics().absent["fid"] and asked_for == [[3]]


@pytest.fixture
def colour_classifier(monkeypatch):
    """In place of Inception: logits [B, 3] from the mean colour."""

    class MeanColour(torch.nn.Module):
        def forward(self, images):
            assert images.dtype == torch.uint8
            return images.float().mean((2, 3)) / 25

    monkeypatch.setattr("torchmetrics.image.inception.NoTrainInceptionV3", lambda **kwargs: MeanColour())


@pytest.fixture
def no_score(monkeypatch):
    monkeypatch.setattr(utils, "_load_inception_score", unavailable)


@pytest.fixture
def no_features(monkeypatch):
    monkeypatch.setattr(utils, "_load_inception", unavailable)


def unavailable():
    raise MetricUnavailable("not here")


def test_inception_score_is_the_mean_over_splits_and_leaves_the_global_generator_alone(colour_classifier, no_features):
    images = eight_bit(20, seed=1)
    state = torch.get_rng_state()
    score = measured(images, images).compute()["inception_score"]
    assert measured(images, images, batch_size=20).compute()["inception_score"] == pytest.approx(score)
    assert torch.equal(torch.get_rng_state(), state)
    p = np.exp(to_uint8(images).astype(np.float64).mean((1, 2)) / 25)
    p /= p.sum(1, keepdims=True)
    shuffled = p[torch.randperm(20, generator=torch.Generator().manual_seed(0)).numpy()]
    by_split = [np.exp((s * np.log(s / s.mean(0))).sum(1).mean()) for s in np.split(shuffled, 10)]
    assert score["value"] == pytest.approx(np.mean(by_split), rel=1e-5)
    assert score["std"] == pytest.approx(np.std(by_split, ddof=1), rel=1e-4)


def test_sets_that_are_too_small_are_absent_with_the_reason(random_inception, colour_classifier):
    metrics = measured(eight_bit(1, seed=1), eight_bit(1, seed=2))
    assert metrics.compute() == {}
    assert metrics.absent["fid"] == metrics.absent["kid"] == "needs at least 2 images, got 1"
    assert metrics.absent["inception_score"] == "needs more than 10 images, got 1"


def test_set_metrics_without_weights_are_absent_with_the_reason(offline):
    metrics = measured(eight_bit(11, seed=1), eight_bit(11, seed=2))
    assert set(metrics.compute()) == {"squeezenet_frechet"} and set(metrics.absent) == {"fid", "kid", "inception_score"}
    assert len(offline) == 2
    assert all("Name or service not known" in reason and "\n" not in reason for reason in metrics.absent.values())
    off = SetMetrics(wanted=False)
    assert len(offline) == 2 and set(off.absent.values()) == {"switched off"} and off.compute() == {}


# ---- means


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


# ------------------------------------------------------------------------------------------------------------ SqueezeNet
def squeezenet_by_hand(images: torch.Tensor) -> list[torch.Tensor]:
    """RGB [B, 3, H, W] in [0, 1] => features of conv1, fire4, fire8, fire9, from the stored codes and the published layout."""
    stored = np.load(REPO / "assets/squeezenet/weights.npz")

    def convolved(features: torch.Tensor, layer: str, **options) -> torch.Tensor:
        weight = torch.from_numpy(np.take(stored[f"{layer}.values"], stored[f"{layer}.codes"]))
        return torch.relu(F.conv2d(features, weight, torch.from_numpy(stored[f"{layer}.bias"]), **options))

    red, green, blue = (images * 255).unbind(1)
    features = convolved(torch.stack([blue - 104, green - 117, red - 123], 1), "conv1", stride=2)
    kept = [features]
    for fire in range(2, 10):
        if fire in (2, 5, 9):
            features = F.max_pool2d(features, 3, 2, ceil_mode=True)
        squeezed = convolved(features, f"fire{fire}/conv1x1_1")
        expanded = convolved(squeezed, f"fire{fire}/conv1x1_2"), convolved(squeezed, f"fire{fire}/conv3x3_2", padding=1)
        features = torch.cat(expanded, 1)
        if fire in (4, 8, 9):
            kept.append(features)
    return kept


def test_squeezenets_distances_are_those_of_its_published_layout(random_inception, no_score):
    generated, eo = pair(batch=3, size=64)
    metrics = PairMetrics(with_lpips=False, with_squeezenet=True)
    values = metrics(generated, eo)
    for convention, images in in_conventions(generated, eo).items():
        expected = []
        for a, b in zip(*map(squeezenet_by_hand, images), strict=True):
            cosine = F.cosine_similarity(a.double(), b.double(), dim=1)  # |a - b|² = 2 - 2 cos for unit vectors
            expected.append((2 - 2 * cosine).mean((1, 2)))
        assert values[convention]["squeezenet"] == pytest.approx(torch.stack(expected).mean(0).tolist(), abs=1e-4)
    assert metrics(eo, eo.clone())["standard"]["squeezenet"] == pytest.approx([0] * 3, abs=1e-6)
    found = measured(generated, eo, batch_size=2)
    pooled = [
        squeezenet_by_hand(torch.from_numpy(to_uint8(images)).movedim(-1, 1) / 255)[-1].mean((2, 3)).double().numpy()
        for images in (generated, eo)
    ]
    assert found.compute()["squeezenet_frechet"]["value"] == pytest.approx(utils.frechet_distance(*pooled), rel=1e-4)


@pytest.mark.parametrize(("side", "reason"), [(20, "needs sides of at least 21 px"), (40, "takes images of at most 1024 px")])
def test_a_set_with_an_image_that_does_not_fit_has_no_squeezenet_frechet(random_inception, no_score, monkeypatch, side, reason):
    monkeypatch.setitem(utils.MAX_PX, "squeezenet", 1024)
    metrics = measured(eight_bit(3, seed=1), eight_bit(3, seed=2))
    assert "squeezenet_frechet" in metrics.compute()
    metrics.update(eight_bit(1, seed=3, size=side), eight_bit(1, seed=4, size=side))
    assert "squeezenet_frechet" not in metrics.compute()
    assert metrics.absent["squeezenet_frechet"] == f"{reason}, {'an image' if side == 20 else 'one'} has {side} x {side}"


def test_squeezenets_weights_are_the_published_ones(samples):
    decoded, stored = (
        np.load(samples / "squeezenet/squeezenet_v1.0_decoded.npz"),
        np.load(REPO / "assets/squeezenet/weights.npz"),
    )
    layers = [name.removesuffix(".w") for name in decoded.files if name.endswith(".w") and name != "conv_final.w"]
    assert {name.rsplit(".", 1)[0] for name in stored.files} == set(layers)
    for layer in layers:
        assert np.array_equal(stored[f"{layer}.values"][stored[f"{layer}.codes"]], decoded[f"{layer}.w"])
        assert np.array_equal(stored[f"{layer}.bias"], decoded[f"{layer}.b"])


def test_squeezenets_distance_grows_with_blur():
    """On real EO tiles; PSNR hardly punishes the first of these blurs."""
    eo = to_tensor(np.stack([read_eo(file) for file in sorted((REPO / "data/sentinel_demo/test/eo").iterdir())[::32]]))
    metrics = PairMetrics(with_lpips=False, with_squeezenet=True)
    blurred = [torchvision.transforms.functional.gaussian_blur(eo, 21, sigma) for sigma in (0.5, 1.0, 2.0)]
    weak, medium, strong = (np.array(metrics(images, eo)["standard"]["squeezenet"]) for images in blurred)
    assert (weak < medium).all() and (medium < strong).all() and (strong > 0.3).all()
