"""What the confidence is worth on real pairs: the demo's Sentinel tiles, three seeds.

    python benchmarks/real_confidence.py --output work_dir/real_confidence   # hours on 2 CPU cores; continues

Per seed: a stage 1, then three stages 2 of equal updates (C-Diff, MSE, MSE with C-Diff's weights over timesteps), and a model
of the other direction. Does σ² (each readout), the spread of samples or the calibrated error rank real errors, beside
brightness, local variation and gradient? Does it rise in a region that training never sees? Do planted changes show in the maps
and in the audit, and in three further ideas (benchmarks/confidence_ideas.py)? Writes REAL_CONFIDENCE.md, results.json and
figure.png.
"""

import json
import platform
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import PRECISION, Model, machine, write_json

# isort: split
import torch

import utils
from benchmarks.confidence_ideas import (
    blanked_contrast,
    error_features,
    predict_error,
    swapped_surprise,
    train_error_network,
)
from benchmarks.discrepancy import (
    Size,
    Variant,
    cdiff_weights,
    check_settings,
    expected_sigma2,
    project_loss,
    start_unet,
    train,
    weighted_mse,
)
from benchmarks.measures import Scenes, at_pixels, residuals, sampled, uncertainty_maps
from benchmarks.real_confidence_report import report
from benchmarks.rival_models import BASE, PAIRS, base_hashes
from cdiffset.auditing.residual import TIMESTEPS
from cdiffset.calibration import calibration
from cdiffset.config import DEFAULT_PROMPT
from cdiffset.device import keep_freed_memory, quickest_autocast
from cdiffset.errors import Parser, run
from cdiffset.evaluation.baselines import trivial_baselines
from cdiffset.evaluation.uncertainty import auroc, ause, spearman
from cdiffset.images import list_images, write_png, write_text, written_whole
from cdiffset.model import embed_prompt, load_scheduler, load_unet, load_vae
from cdiffset.pipeline import make_sampler
from demo.pretrain_base import encode_all, read_tiles

SIZES = {
    "tiny": Size(8, 4, 1, 1, 4, 8e-4, (0,), samples=2, steps=3, warmup=0),  # shows that the command works, nothing else
    "small": Size(1014, 128, 350, 1650, 16, 8e-4, (0, 1, 2), samples=8, steps=8, ema_decay=0.998),
}
MSE, CDIFF = Variant("MSE", confidence=False), Variant("C-Diff, β = timestep")
VARIANTS = {"mse": MSE, "mse_weighted": Variant("MSE, timesteps weighted as by C-Diff", confidence=False), "cdiff": CDIFF}
ERROR_UPDATES = {"tiny": 2, "small": 400}
PATCH_PX = (8, 24)  # sides of planted changes
# The audit's timestep was chosen on SD's schedule; with this base's, where it leaves no trace of the EO, an earlier one has
# as much noise.
AUDITS = {"audit": TIMESTEPS, "audit, t = 750": (750,)}
BASELINES = ("SAR brightness", "SAR local variation", "SAR gradient")
FIGURE_TILES = 5


# -------------------------------------------------------------------------------------------------------------- the pairs
def read_part(part: str, most: int) -> tuple[Scenes, list[str]]:
    """Pairs without any planted change, evenly chosen, and the place that each comes from."""
    tiles, names = read_tiles(PAIRS / part), list_images(PAIRS / part / "eo")
    chosen = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))
    sar, eo = (tiles[kind][chosen].float() / 127.5 - 1 for kind in ("sar", "eo"))
    nothing = np.zeros((len(sar), *sar.shape[-2:]), bool)
    masks = dict.fromkeys(("sar_only", "eo_only", "movable", "permanent"), nothing)
    return Scenes(sar, eo, eo, eo, masks, nothing.astype(int)), [names[index].stem.split("_")[0] for index in chosen]


def plant_changes(scenes: Scenes, places: list[str]) -> Scenes:
    """Paste a rectangle of a tile of another place into the SAR alone of every other pair, into the EO alone of the rest."""
    rng, sar, eo = np.random.default_rng(0), scenes.sar.clone(), scenes.eo.clone()
    masks = {name: mask.copy() for name, mask in scenes.masks.items()}
    for index in range(len(sar)):
        donor = rng.choice([other for other, place in enumerate(places) if place != places[index]])
        height, width = rng.integers(*PATCH_PX, 2, endpoint=True)
        top, left = (rng.integers(side - size + 1) for side, size in zip(sar.shape[-2:], (height, width), strict=True))
        rows, columns = slice(top, top + height), slice(left, left + width)
        target, source, mask = (sar, scenes.sar, "sar_only") if index % 2 == 0 else (eo, scenes.eo, "eo_only")
        target[index, :, rows, columns] = source[donor, :, rows, columns]
        masks[mask][index, rows, columns] = True
    return replace(scenes, sar=sar, eo=eo, masks=masks)


# --------------------------------------------------------------------------------------------------------------- training
def training_latents(output: Path, most: int) -> torch.Tensor:
    """[pairs, 2, C, h, w], SAR and EO."""
    file = output / "latents.pt"
    if not file.is_file():
        tiles, vae = read_tiles(PAIRS / "train"), load_vae(str(BASE))
        with written_whole(file) as temporary:
            torch.save(torch.stack([encode_all(vae, tiles[kind][:most]) for kind in ("sar", "eo")], 1), temporary)
    return torch.load(file, weights_only=True).float()


def trained(
    folder: Path, variant: Variant, start: Path | None, loss_of, latents: torch.Tensor, size: Size, updates: int, seed: int
):
    """The averaged U-Net of a variant, trained unless it is there."""
    if not (folder / "unet").is_dir():
        average = train(start_unet(str(BASE), variant, start), loss_of, latents, size, updates, seed, "cpu")
        average.save_pretrained(folder / "unet.part")
        (folder / "unet.part").rename(folder / "unet")
    return load_unet(str(folder), str(BASE), latents.shape[2], "trained")[0].eval()


def train_all(output: Path, size: Size, seed: int, scheduler, prompt: torch.Tensor) -> dict[str, torch.nn.Module]:
    """{variant: U-Net}, and `swapped`, which predicts the SAR from the EO."""
    latents, folder = training_latents(output, size.train), output / f"seed{seed}"
    loss_of = partial(project_loss, scheduler=scheduler, prompt_embedding=prompt, beta="timestep")
    make = partial(trained, latents=latents, size=size)
    make(folder / "stage1", MSE, None, loss_of, updates=size.stage1, seed=10 * seed)
    second = partial(make, start=folder / "stage1", updates=size.stage2, seed=10 * seed + 1)
    unets = {name: second(folder / name, VARIANTS[name], loss_of=loss_of) for name in ("cdiff", "mse")}
    weights = cdiff_weights(scheduler, expected_sigma2(unets["cdiff"], scheduler, latents, prompt))
    weighted = partial(weighted_mse, scheduler=scheduler, prompt_embedding=prompt, weights=weights)
    unets["mse_weighted"] = second(folder / "mse_weighted", VARIANTS["mse_weighted"], loss_of=weighted)
    both = size.stage1 + size.stage2
    unets["swapped"] = trained(folder / "swapped", CDIFF, None, loss_of, latents.flip(1), size, both, 10 * seed + 2)
    return unets


# ------------------------------------------------------------------------------------------------------------- evaluation
def picture_numbers(generated: torch.Tensor, eo: torch.Tensor) -> dict[str, float]:
    values = utils.PairMetrics(with_lpips=False, with_squeezenet=True, conventions=("standard",))(generated, eo)["standard"]
    return {metric: float(np.mean(values[metric])) for metric in ("psnr", "ssim", "squeezenet")}


def pixel_error(generated: torch.Tensor, eo: torch.Tensor) -> np.ndarray:
    """|generated - eo|, mean over RGB, in 8-bit units => [N, H, W]."""
    return (generated.clamp(-1, 1) - eo).abs().mean(1).double().numpy() * 127.5


def baseline_maps(scenes: Scenes) -> dict[str, np.ndarray]:
    pixels = ((scenes.sar + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    maps = [trivial_baselines(each, each.shape[:2], "") for each in pixels]
    return {name: np.stack([each[name] for each in maps]) for name in BASELINES}


class Sampled:
    """What one model makes of some pairs: samples, their mean, errors, and every map [N, H, W]."""

    def __init__(self, model: Model, scenes: Scenes, size: Size):
        self.scenes = scenes
        self.pictures, self.sigma2 = sampled(model, scenes, size.steps, size.samples)
        self.mean = self.pictures.mean(0)
        self.errors = {"sample": pixel_error(self.pictures[0], scenes.eo), "mean": pixel_error(self.mean, scenes.eo)}
        maps = uncertainty_maps(scenes, self.pictures, self.sigma2, model.scheduler.timesteps.tolist())
        self.maps = baseline_maps(scenes) | {name: at_pixels(map_.values, scenes) for name, map_ in maps.items()}
        self.spread_name = f"spread of {size.samples} samples"

    @property
    def features(self) -> torch.Tensor:
        spread = torch.from_numpy(self.maps[self.spread_name])[:, None].float()
        return error_features(self.scenes.sar, self.mean, spread, self.sigma2.mean((0, 1)))

    def calibrated_maps(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """What a calibration takes, of the chosen pairs, all pixels in a row."""
        return {"variance": self.maps["σ² mean"][chosen].ravel(), "spread": self.maps[self.spread_name][chosen].ravel()}


def ranking(found: Sampled) -> dict[str, dict[str, dict[str, float]]]:
    """{map: {"sample" or "mean": {"spearman", "ause"}}} of the error of one sample or of the mean of all."""
    return {
        name: {of: {"spearman": spearman(scores, error), "ause": ause(scores, error)} for of, error in found.errors.items()}
        for name, scores in found.maps.items()
    }


def add_calibrated_error(test: Sampled, places: list[str], unseen: Sampled) -> dict[str, dict[str, float]]:
    """Fit the expected error of the mean on half of the places, for the other half, and conversely; on all, for the unseen.

    Adds the map "expected error" to both => {"other places", "unseen": {level: coverage}}.
    """
    numbers = np.array([sorted(set(places)).index(place) for place in places])
    test.maps["expected error"] = np.zeros_like(test.errors["mean"])
    inside: dict[str, list[np.ndarray]] = {}
    for half in (0, 1):
        mine, others = numbers % 2 == half, numbers % 2 != half
        fitted, quantiles = fit_on(test, mine, numbers)
        expected = fitted.expected_error(test.calibrated_maps(others)).reshape(test.errors["mean"][others].shape)
        test.maps["expected error"][others] = expected
        for level, quantile in quantiles.items():
            inside.setdefault(level, []).append((test.errors["mean"][others] <= quantile * expected).ravel())
    everything = np.ones(len(places), bool)
    fitted, quantiles = fit_on(test, everything, numbers)
    everywhere = np.ones(len(unseen.mean), bool)
    unseen.maps["expected error"] = fitted.expected_error(unseen.calibrated_maps(everywhere)).reshape(
        unseen.errors["mean"].shape
    )
    return {
        "other places": {level: float(np.concatenate(each).mean()) for level, each in inside.items()},
        "unseen": {
            level: float((unseen.errors["mean"] <= quantile * unseen.maps["expected error"]).mean())
            for level, quantile in quantiles.items()
        },
    }


def fit_on(test: Sampled, chosen: np.ndarray, numbers: np.ndarray) -> tuple[calibration.Calibration, dict[str, float]]:
    """Curves by every other pair of the chosen places, intervals by the rest, as calibrate.py does."""
    indices = np.flatnonzero(chosen)
    curves_by, intervals_by = (np.isin(np.arange(len(numbers)), part) for part in (indices[::2], indices[1::2]))
    curves, weight, joint = calibration.fit(test.calibrated_maps(curves_by), test.errors["mean"][curves_by].ravel())
    fitted = calibration.Calibration({}, "", curves, weight, joint)
    expected, error = fitted.expected_error(test.calibrated_maps(intervals_by)), test.errors["mean"][intervals_by].ravel()
    return fitted, {f"{level:g}": calibration.conformal_quantile(expected, error, level) for level in calibration.LEVELS}


def rise(test: Sampled, unseen: Sampled) -> dict[str, dict[str, float]]:
    """{map or error: mean in the unseen region over that of the test places, and AUROC of whole tiles}."""
    both = {name: (test.maps[name], unseen.maps[name]) for name in test.maps}
    both["true error of the mean"] = test.errors["mean"], unseen.errors["mean"]
    numbers = {}
    for name, maps in both.items():
        known, new = (each.mean((1, 2)) for each in maps)
        is_new = np.repeat([False, True], [len(known), len(new)])
        score = auroc(np.concatenate([known, new]), is_new, ~is_new)
        numbers[name] = {"ratio": float(new.mean() / known.mean()), "auroc": score}
    return numbers


def detection(scores: dict[str, np.ndarray], planted: Scenes) -> dict[str, dict[str, float]]:
    """{map: AUROC of the pixels of each kind of change against all pixels without}."""
    clean = ~planted.discrepant
    return {
        name: {kind: auroc(score, planted.masks[kind], clean) for kind in ("sar_only", "eo_only")}
        for name, score in scores.items()
    }


def suspicion_maps(model: Model, swapped: Model, found: Sampled, expected: np.ndarray) -> dict[str, np.ndarray]:
    """Maps that see both images: the audit, the difference to the mean picture, and two of the ideas."""
    pair = found.scenes.sar, found.scenes.eo
    difference = found.errors["mean"]
    maps = {
        **{name: residuals(model, *pair, timesteps=timesteps) for name, timesteps in AUDITS.items()},
        "blanked SAR": blanked_contrast(model, *pair),
        "swapped": swapped_surprise(swapped, *pair),
    }
    return {
        **{name: at_pixels(map_, found.scenes) for name, map_ in maps.items()},
        "difference to the mean": difference, "difference over its expectation": difference / expected,
    }  # fmt: skip


def evaluate_seed(output: Path, name: str, seed: int) -> dict:
    """Train and evaluate everything of a seed => its numbers, which are also kept in result.json."""
    size, file = SIZES[name], output / f"seed{seed}/result.json"
    if file.is_file():
        return json.loads(file.read_text())
    scheduler, prompt = load_scheduler(str(BASE), "v_prediction"), embed_prompt(str(BASE), DEFAULT_PROMPT)
    unets, vae = train_all(output, size, seed, scheduler, prompt), load_vae(str(BASE))
    models = {
        kind: Model(unet, vae, make_sampler(scheduler, timestep_spacing="trailing"), prompt) for kind, unet in unets.items()
    }
    (test_scenes, places), (unseen_scenes, _) = read_part("test", size.test), read_part("unseen", size.test)
    planted = plant_changes(test_scenes, places)
    with quickest_autocast("cpu"):
        parts = {kind: Sampled(models[kind], test_scenes, size) for kind in VARIANTS}
        test, unseen = parts["cdiff"], Sampled(models["cdiff"], unseen_scenes, size)
        changed = Sampled(models["cdiff"], planted, size)
        learnt = fit_error_network(models["cdiff"], size, name, seed)
        coverage = add_calibrated_error(test, places, unseen)
        for found in (test, unseen, changed):
            found.maps["learnt error"] = predict_error(learnt, found.features)[:, 0].double().numpy()
        suspicion = suspicion_maps(models["cdiff"], models["swapped"], changed, changed.maps["learnt error"])
    pictures = {
        kind: {of: picture_numbers(shown, test_scenes.eo) for of, shown in (("sample", each.pictures[0]), ("mean", each.mean))}
        for kind, each in parts.items()
    }
    numbers = {
        "seed": seed, "pictures": pictures, "coverage": coverage, "rise": rise(test, unseen),
        "ranking": {"test": ranking(test), "unseen": ranking(unseen)},
        "planted": detection({**changed.maps, **suspicion}, planted),
    }  # fmt: skip
    if seed == size.seeds[0]:
        write_png(output / "figure.png", figure(test, changed, suspicion["audit"]))
    write_json(file, numbers)
    return numbers


def fit_error_network(model: Model, size: Size, name: str, seed: int):
    """Idea 3: the error of decoded pixels, learnt from translations of every fourth training pair."""
    scenes, _ = read_part("train", max(1, size.train // 4))
    found = Sampled(model, scenes, size)
    with torch.autocast("cpu", enabled=False):
        error = torch.from_numpy(found.errors["mean"])[:, None].float()
        return train_error_network(found.features.float(), error, ERROR_UPDATES[name], seed)


# ----------------------------------------------------------------------------------------------------------------- report
def write_report(results: list[dict], name: str, output: Path) -> None:
    size, packages = SIZES[name], ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers"))
    heading = f"""Written by `python benchmarks/real_confidence.py --size {name}`
on {machine("cpu")} (Python {platform.python_version()}, {packages}).

- Pairs: `data/sentinel_demo`. Training from `assets/sentinel_base`: {size.stage1} updates of stage 1, {size.stage2} of stage 2,
  batches of {size.batch_size}, {PRECISION};
  all losses of a seed share stage 1, batches, noise and timesteps. {len(results)} seeds; ± is the
  half-width of the 95 % interval over them.
- Translation: {size.steps} DDIM steps, trailing; `sample` is the first of {size.samples}, `mean` their mean. Maps: of C-Diff.
- Errors: |generated - EO|, mean over RGB, pooled over all pixels.
- Planted changes: rectangles of {PATCH_PX[0]} to {PATCH_PX[1]} px from another place, in the SAR alone or the EO alone."""
    text = report(results, {kind: variant.label for kind, variant in VARIANTS.items()}, heading)
    write_text(output / "REAL_CONFIDENCE.md", text)
    write_json(output / "results.json", results)
    print(text)


def figure(test: Sampled, changed: Sampled, audit: np.ndarray) -> np.ndarray:
    """Evenly chosen tiles: SAR, EO, sample, mean, true error, maps on one scale each, the changed image and its audit."""
    scenes, count = test.scenes, len(test.mean)
    chosen = np.unique(np.linspace(0, count - 1, FIGURE_TILES + 2).round().astype(int)[1:-1])

    def grey(values: np.ndarray) -> torch.Tensor:
        low, high = np.quantile(values, (0.02, 0.98))
        return torch.from_numpy(((values - low) / max(high - low, 1e-9)).clip(0, 1))[:, None].float()

    planted = changed.scenes
    both = torch.where(
        torch.from_numpy(planted.masks["sar_only"]).any((1, 2))[:, None, None, None].cpu(), planted.sar, planted.eo
    )
    columns = {
        "SAR": scenes.sar, "EO": scenes.eo, "one sample": test.pictures[0], "mean": test.mean,
        "true error": grey(test.errors["mean"]), "σ² midpoint": grey(test.maps["σ² midpoint"]),
        "spread": grey(test.maps[test.spread_name]), "expected error": grey(test.maps["expected error"]),
        "with change": both, "change": grey(planted.discrepant.astype(float)), "audit": grey(audit),
    }  # fmt: skip
    rows = [
        utils.panel([images[index].clamp(-1, 1) for images in columns.values()], list(columns) if place == 0 else None)
        for place, index in enumerate(chosen)
    ]
    return np.concatenate(rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="What the confidence is worth on real pairs.", allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small", help="tiny: a check of the command [small]")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of the report")
    args = parser.parse_args(argv)
    check_settings(args.output, {"size": asdict(SIZES[args.size]), "base": base_hashes()})
    keep_freed_memory(torch.device("cpu"))
    results = [evaluate_seed(args.output, args.size, seed) for seed in SIZES[args.size].seeds]
    write_report(results, args.size, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
