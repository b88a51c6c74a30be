"""The discrepancy benchmark's tables and figure, from the results of its jobs."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from scipy.stats import t as student_t

import utils
from benchmarks.harness import table
from benchmarks.measures import APPEARS, Scenes

Results = dict[tuple[str, str], dict[int, dict]]  # (level, variant) -> seed -> numbers
Columns = dict[str, tuple[str, int]]  # title -> (path of keys to a number of a seed, digits shown)
SCALE = 2  # a 64 px scene is shown at 128 px
FIGURE_SCENES = 5


# ------------------------------------------------------------------------------------------------------------------- statistics
def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval (Student's t over the seeds); NaN from a single seed."""
    n = len(values)
    half = student_t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def cell(values: list[float | None], digits: int = 3) -> str:
    if not values or any(value is None for value in values):
        return "–"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def over_seeds(results: Results, level: str, variant: str, path: str) -> list[float | None]:
    """The number at a path of keys ("picture/psnr") of each seed, None where there is none."""
    values = []
    for _, numbers in sorted(results.get((level, variant), {}).items()):
        for key in path.split("/"):
            numbers = numbers.get(key) if isinstance(numbers, dict) else None
        values.append(numbers)
    return values


def cells(results: Results, level: str, variant: str, columns: Iterable[tuple[str, int]]) -> list[str]:
    return [cell(over_seeds(results, level, variant, path), digits) for path, digits in columns]


def difference(results: Results, better: str, worse: str, path: str) -> list[float]:
    """Of each seed that both have: what `better` has more than `worse`, at the standard level."""
    ours, theirs = (
        dict(zip(sorted(results.get(("standard", name), {})), over_seeds(results, "standard", name, path), strict=True))
        for name in (better, worse)
    )
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def verdict(values: list[float], sign: int = 1) -> str:
    """What an interval over the seeds says of a claim that the difference has this sign."""
    mean, half = interval(values) if values else (math.nan, math.nan)
    if not math.isfinite(half):
        return "too few seeds"
    if abs(mean) <= half:
        return "undecided"
    return "supported" if mean * sign > 0 else "contradicted"


# ----------------------------------------------------------------------------------------------------------------------- tables
EARLY, BRIGHTNESS = "σ² early", "SAR brightness"
PICTURE: Columns = {
    "PSNR [dB] ↑": ("picture/psnr", 2), "SSIM ↑": ("picture/ssim", 3), "PSNR outside ↑": ("picture/psnr_outside", 2),
    "PSNR inside": ("picture/psnr_inside", 2), "hallucination rate ↓": ("picture/drawn_sar_only", 3),
    "drawn, of objects in both ↑": ("picture/drawn_both", 3), "drawn, of EO-only": ("picture/drawn_eo_only", 3),
}  # fmt: skip
CONFIDENCE: Columns = {
    "σ² AUROC movable / permanent ↑": (f"maps/{EARLY}/auroc_movable", 3),
    "σ² AUROC SAR-only ↑": (f"maps/{EARLY}/auroc_sar_only", 3), "σ² AP SAR-only ↑": (f"maps/{EARLY}/ap_sar_only", 3),
    "σ² AUSE ↓": (f"maps/{EARLY}/ause", 3), "σ² ENCE ↓": (f"maps/{EARLY}/ence", 3), "audit AUROC ↑": ("audit/auroc_all", 3),
    "audit AP ↑": ("audit/ap_all", 3),
}  # fmt: skip
AUDIT: Columns = {
    "AUROC all ↑": ("audit/auroc_all", 3), "AUROC SAR-only ↑": ("audit/auroc_sar_only", 3),
    "AUROC EO-only ↑": ("audit/auroc_eo_only", 3), "AP all ↑": ("audit/ap_all", 3),
    "AP SAR-only ↑": ("audit/ap_sar_only", 3), "AP EO-only ↑": ("audit/ap_eo_only", 3),
}  # fmt: skip
LEVEL: Columns = {
    "PSNR [dB] ↑": ("picture/psnr", 2), "PSNR inside": ("picture/psnr_inside", 2),
    "hallucination rate ↓": ("picture/drawn_sar_only", 3), "drawn, of objects in both ↑": ("picture/drawn_both", 3),
    "brightness AUROC movable": (f"maps/{BRIGHTNESS}/auroc_movable", 3),
    "σ² AUROC movable ↑": (f"maps/{EARLY}/auroc_movable", 3), "σ² AUROC SAR-only ↑": (f"maps/{EARLY}/auroc_sar_only", 3),
    "audit AUROC ↑": ("audit/auroc_all", 3),
}  # fmt: skip
READOUT = {
    "AUROC movable / permanent ↑": "auroc_movable", "AUROC SAR-only ↑": "auroc_sar_only", "AP SAR-only ↑": "ap_sar_only",
    "AUROC EO-only": "auroc_eo_only", "Spearman with the error ↑": "spearman", "AUSE ↓": "ause", "ENCE ↓": "ence",
}  # fmt: skip
AT_TIMESTEP = {
    "AUROC movable / permanent": "auroc_movable", "AUROC SAR-only": "auroc_sar_only", "AUROC EO-only": "auroc_eo_only",
}  # fmt: skip
MEAN_PICTURE = {
    "PSNR [dB] ↑": ("psnr", 2), "PSNR inside": ("psnr_inside", 2), "PSNR outside ↑": ("psnr_outside", 2),
    "hallucination rate ↓": ("drawn_sar_only", 3), "drawn, of objects in both ↑": ("drawn_both", 3),
}  # fmt: skip
CLAIMS = [  # claim, measure, its unit's digits, variants compared, sign claimed
    ("C-Diff translates better than stage 1 alone", "psnr", 2, "cdiff", "mse", 1),
    ("… inside the discrepancies", "psnr_inside", 2, "cdiff", "mse", 1),
    ("… outside them", "psnr_outside", 2, "cdiff", "mse", 1),
    ("C-Diff hallucinates less than stage 1 alone", "drawn_sar_only", 3, "cdiff", "mse", -1),
    ("the weighting of timesteps alone gains: weighted MSE against MSE", "psnr", 2, "mse_weighted", "mse", 1),
    ("σ² itself adds to the weighting: C-Diff against the weighted MSE", "psnr", 2, "cdiff", "mse_weighted", 1),
    ("… inside the discrepancies", "psnr_inside", 2, "cdiff", "mse_weighted", 1),
    ("… fewer hallucinations", "drawn_sar_only", 3, "cdiff", "mse_weighted", -1),
    ("β = timestep is better than β = 0", "psnr", 2, "cdiff", "beta0", 1),
    ("β = timestep is better than β = 0.5", "psnr", 2, "cdiff", "beta05", 1),
    ("β = timestep is better than β = 1", "psnr", 2, "cdiff", "beta1", 1),
    ("the fixed prompt is better than the null prompt", "psnr", 2, "cdiff", "null_prompt", 1),
    ("stage 1 helps, at equal iterations in all", "psnr", 2, "cdiff", "no_stage1", 1),
]  # fmt: skip


def variant_table(results: Results, labels: dict[str, str], columns: Columns) -> str:
    """A row per variant, a column per measure, at the standard level."""
    return table(
        ["variant", *columns],
        [[label, *cells(results, "standard", name, columns.values())] for name, label in labels.items()],
    )


def level_table(results: Results, levels: list[str], labels: dict[str, str]) -> str:
    rows = [
        [level, label, len(seeds), *cells(results, level, name, LEVEL.values())]
        for level in levels
        for name, label in labels.items()
        if (seeds := results.get((level, name)))
    ]
    return table(["level", "variant", "seeds", *LEVEL], rows)


def readout_table(results: Results, variant: str) -> str:
    """A row per map of a variant at the standard level, in the order of the AUROC of movable against permanent structures."""
    first = next(iter(results["standard", variant].values()))["maps"]
    order = {name: np.mean(over_seeds(results, "standard", variant, f"maps/{name}/auroc_movable")) for name in first}
    rows = []
    for name in sorted(first, key=lambda name: -order[name]):
        columns = [(f"maps/{name}/{measure}", 3) for measure in READOUT.values()]
        rows.append([name, first[name]["passes"], *cells(results, "standard", variant, columns)])
    return table(["map", "U-Net passes", *READOUT], rows)


def timestep_table(results: Results, variant: str) -> str:
    """AUROC of σ² by the step of sampling at which it is read, at about eight of the steps."""
    timesteps = list(next(iter(results["standard", variant].values()))["by_timestep"])
    shown = timesteps[:: max(1, len(timesteps) // 8)]
    rows = []
    for label, measure in AT_TIMESTEP.items():
        columns = [(f"by_timestep/{timestep}/{measure}", 2) for timestep in shown]
        rows.append([label, *cells(results, "standard", variant, columns)])
    return table(["σ² at timestep", *shown], rows)


def mean_picture_table(results: Results) -> str:
    rows = []
    for variant, label in (("mse", "MSE"), ("cdiff", "C-Diff")):
        for output, key in (("one sample", "picture"), ("mean of all samples", "picture_of_mean")):
            columns = [(f"{key}/{measure}", digits) for measure, digits in MEAN_PICTURE.values()]
            rows.append([label, output, *cells(results, "standard", variant, columns)])
    return table(["loss", "output", *MEAN_PICTURE], rows)


def claims_table(results: Results) -> str:
    rows = []
    for claim, measure, digits, better, worse, sign in CLAIMS:
        values = difference(results, better, worse, f"picture/{measure}")
        name = "hallucination rate" if measure == "drawn_sar_only" else measure
        rows.append([claim, name, cell(values, digits), verdict(values, sign)])
    return table(["claim", "difference in", "mean ± 95 % interval", "verdict"], rows)


def targets_table(results: Results) -> str:
    """What the benchmark set out to reach, and what it reached: means over the seeds."""

    def mean(path: str) -> float:
        return float(np.mean(over_seeds(results, "standard", "cdiff", path)))

    maps = next(iter(results["standard", "cdiff"].values()))["maps"]
    movable = {name: mean(f"maps/{name}/auroc_movable") for name in maps}
    best = max((name for name in maps if name != BRIGHTNESS), key=movable.get)
    single = max((name for name in maps if name.startswith("σ²") and "noises" not in name), key=movable.get)
    gain = difference(results, "cdiff", "mse", "picture/psnr")
    reached = [  # target, bound, value, whether larger is better
        ("AUROC movable / permanent of the SAR's brightness", 0.60, movable[BRIGHTNESS], False),
        (f"… of the best readout: {best}", 0.80, movable[best], True),
        (f"… of the best σ² of a single sample: {single}", 0.80, movable[single], True),
        ("audit AUROC, all discrepancies", 0.95, mean("audit/auroc_all"), True),
        ("PSNR of C-Diff minus that of MSE [dB]", 0.0, float(np.mean(gain)) if gain else math.nan, True),
    ]
    rows = []
    for target, bound, value, larger in reached:
        met = "reached" if (value >= bound if larger else value <= bound) else "missed"
        rows.append([target, f"{'≥' if larger else '≤'} {bound:.2f}", f"{value:.3f}", "–" if math.isnan(value) else met])
    return table(["target", "bound", "mean over the seeds", "verdict"], rows)


# ----------------------------------------------------------------------------------------------------------------------- figure
def figure(scenes: Scenes, maps: dict[str, dict[str, np.ndarray]]) -> Image.Image:
    """A row per scene, those with the most discrepant pixels. maps: of measures.evaluate, by variant ("mse", "cdiff").

    With a palette: a figure of many panels is a third of its size then.
    """
    chosen = np.argsort(-scenes.discrepant.sum((1, 2)), kind="stable")[:FIGURE_SCENES]
    truth = torch.full_like(scenes.eo, -1)
    for name, colour in (("sar_only", (1.0, -0.3, -0.5)), ("eo_only", (-0.5, 0.1, 1.0))):
        truth = torch.where(torch.from_numpy(scenes.masks[name])[:, None], torch.tensor(colour)[:, None, None], truth)
    cdiff = maps["cdiff"]
    spread = next(name for name in cdiff if name.startswith("spread"))
    shown = {"variance, early": EARLY, "variance, midpoint": "σ² midpoint", "spread": spread, "audit": "audit"}
    columns = {
        "SAR": scenes.sar, "EO": scenes.eo, "MSE": torch.from_numpy(maps["mse"]["generated"]),
        "C-Diff": torch.from_numpy(cdiff["generated"]),
        **{title: torch.from_numpy(stretched(cdiff[name]))[:, None] for title, name in shown.items()}, "only SAR / EO": truth,
    }  # fmt: skip
    rows = []
    for place, scene in enumerate(chosen):
        enlarged = [column[scene].repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2) for column in columns.values()]
        rows.append(utils.panel(enlarged, list(columns) if place == 0 else None))
    spacer = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
    pixels = np.concatenate([piece for row in rows for piece in (row, spacer)][:-1])
    return Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE)


def stretched(maps: np.ndarray) -> np.ndarray:
    """[N, H, W] => [0, 1], one scale for all scenes: its 1st to 99th percentile."""
    low, high = np.percentile(maps, (1, 99))
    return np.clip((maps - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------- report
DEFINITIONS = f"""
All numbers are of held-out scenes. A cell is the mean over the training seeds with the half-width of its 95 % interval
(Student's t); the scenes are the same for all seeds, so the intervals show how much the training's randomness matters, not the
choice of scenes.

- **PSNR, SSIM**: standard convention, per image; PSNR inside and outside the discrepancies pools the pixels of all scenes.
- **Hallucination rate**: share of the objects that only the SAR shows which appear in the output. An object appears where the
  output, over the object's pixels, goes more than {APPEARS:g} of the way from the EO without it to the EO with it (the
  projection on the difference of the two, which the simulator knows). No model can know which of the objects in the SAR were
  gone when the EO was taken. So the share it draws of the objects that are in both stands beside the rate: a model that draws
  fewer of both has gained nothing. EO-only objects are not in the SAR; whatever shows there is drawn by chance.
- **AUROC movable / permanent**: ships and vehicles in the SAR against tanks, platforms and buildings of the same brightness.
  **SAR-only**, **EO-only**: pixels of such objects against all pixels without a discrepancy. **AP**: average precision.
- **Spearman, AUSE, ENCE**: of the map and the output's absolute error, mean over RGB. ENCE: 20 bins, after one global scale.
- **Audit**: the residual of the true pair, noised anew (`cdiffset/auditing/residual.py`).

The lengths, the learning rate, the audit's timestep and the early readout were chosen in trials that looked at some of the same
held-out scenes, and the best readout is the best of those listed: its figure is a little optimistic.
"""


CLAIMS_NOTE = """
Differences between variants of the same seed. Supported: the interval lies on the claimed side of 0. Undecided: it holds 0, and
no more is known than that the difference lies in it. Each row is one test at 95 %, without a correction for their number.
"""


def report(
    results: Results, evaluated: dict[str, str], levels: list[str], at_levels: Iterable[str], heading: str, how_trained: str
) -> str:
    """The whole report. evaluated: {variant: label}, of the standard level; at_levels: the variants of the others, of which
    `how_trained` says what they were trained on.
    """
    labels = {name: label for name, label in evaluated.items() if results.get(("standard", name))}
    parts = [heading, DEFINITIONS]
    if "cdiff" in labels:
        parts += ["## Targets", targets_table(results)]
    parts += [
        "## Claims", CLAIMS_NOTE, claims_table(results),
        "## Pictures", variant_table(results, labels, PICTURE),
        "## Confidence", "σ² is read early: its mean over the first quarter of the steps.",
        variant_table(results, labels, CONFIDENCE),
        "## Audit", variant_table(results, labels, AUDIT),
    ]  # fmt: skip
    for name in ("cdiff", "mse"):
        if name in labels:
            parts += [f"## Where and when uncertainty is read: {labels[name]}", readout_table(results, name)]
    if "cdiff" in labels:
        parts += ["σ² along the sampling, from noise to picture:", timestep_table(results, "cdiff")]
        parts += ["Mean picture of the samples, for comparison:", mean_picture_table(results)]
    parts += ["## Difficulty", how_trained, level_table(results, levels, {name: evaluated[name] for name in at_levels})]
    return "\n\n".join(part.strip() for part in parts) + "\n"
