"""The tables of benchmarks/real_confidence.py, from the numbers of its seeds."""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import table

# isort: split
from benchmarks.discrepancy_report import cell

PICTURES = {"psnr": ("PSNR [dB] ↑", 2), "ssim": ("SSIM ↑", 3), "squeezenet": ("SqueezeNet distance ↓", 3)}
OUTPUTS = ("sample", "mean")
RANKING = {"spearman": "Spearman ↑", "ause": "AUSE ↓"}
KINDS = {"sar_only": "SAR-only", "eo_only": "EO-only"}


def over_seeds(results: list[dict], path: Iterable[str], digits: int = 3) -> str:
    values = results
    for key in path:
        values = [each[key] for each in values]
    return cell(values, digits)


def rows_table(results: list[dict], title: str, rows: Iterable[str], columns: dict[str, tuple]) -> str:
    """A row for each name; columns: {title: (path of keys with None for the row's name, digits)}."""
    lines = [
        [
            row,
            *(over_seeds(results, [row if key is None else key for key in path], digits) for path, digits in columns.values()),
        ]
        for row in rows
    ]
    return table([title, *columns], lines)


def loss_table(results: list[dict], labels: dict[str, str]) -> str:
    columns = [(of, metric) for of in OUTPUTS for metric in PICTURES]
    lines = [
        [label, *(over_seeds(results, ("pictures", kind, of, metric), PICTURES[metric][1]) for of, metric in columns)]
        for kind, label in labels.items()
    ]
    return table(["loss of stage 2", *(f"{PICTURES[metric][0]}, {of}" for of, metric in columns)], lines)


def gap_table(results: list[dict], labels: dict[str, str]) -> str:
    """What C-Diff's PSNR is above that of the other losses, seed by seed."""
    lines = []
    for kind, label in labels.items():
        if kind != "cdiff":
            gaps = [
                [each["pictures"]["cdiff"][of]["psnr"] - each["pictures"][kind][of]["psnr"] for each in results]
                for of in OUTPUTS
            ]
            lines.append([f"C-Diff minus {label}", *(cell(values, 2) for values in gaps)])
    return table(["difference of PSNR [dB]", *OUTPUTS], lines)


def ranking_table(results: list[dict], part: str) -> str:
    measures = [(of, measure) for of in OUTPUTS for measure in RANKING]
    columns = {f"{RANKING[measure]}, {of}": (("ranking", part, None, of, measure), 3) for of, measure in measures}
    return rows_table(results, f"map, {part}", results[0]["ranking"][part], columns)


def report(results: list[dict], labels: dict[str, str], heading: str) -> str:
    first = results[0]
    levels = {f"{float(level):.0%}": (("coverage", None, level), 3) for level in first["coverage"]["unseen"]}
    rise = {"unseen over test": (("rise", None, "ratio"), 2), "AUROC of tiles": (("rise", None, "auroc"), 3)}
    planted = {f"AUROC {name}": (("planted", None, kind), 3) for kind, name in KINDS.items()}
    return f"""# What the confidence is worth on real pairs

{heading}

## Does C-Diff beat the MSE?

{loss_table(results, labels)}

{gap_table(results, labels)}

## Do the maps rank real errors?

{ranking_table(results, "test")}

{ranking_table(results, "unseen")}

The expected error is calibrated for the mean, on half of the test places for the other half and conversely, and for the unseen
region on all of them. The learnt error is idea 3 below.

{rows_table(results, "intervals cover, in", first["coverage"], levels)}

## Do they rise in a region that training never saw?

{rows_table(results, "map", first["rise"], rise)}

## Do planted changes show?

Pixels of a change against all pixels without one. A map that sees the SAR alone cannot know what changed in the EO: there it
says whether changes happen to lie in doubtful places. The rows from the audit on see both images.

{rows_table(results, "map", first["planted"], planted)}

Three ideas: `blanked SAR` is the audit's residual less that with the place blanked in the SAR; `swapped` the SAR's likelihood
given the EO, by a model of the other direction; `learnt error` an error of decoded pixels, by a small network that is fitted to
translations of training pairs, and `difference over its expectation` the difference to the mean picture over it.
"""
