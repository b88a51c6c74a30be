"""Does the audit find the misregistered pairs of a real dataset? The demo's source, as it came and registered.

    python benchmarks/registration.py --checkpoint work_dir/demo/stage2/best --source Optical-SAR-dataset

Scores the tiles of every fragment twice, with its EO where it was and where data/make_sentinel_demo.py moves it, by the audit.
Fragments that training has seen were seen registered, hence a table of their own. Minutes on two CPU cores.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import Model, load_checkpoint, table

# isort: split
import torch
from tqdm import tqdm

from benchmarks.measures import residuals
from cdiffset.errors import Parser, UserError, run
from cdiffset.evaluation.uncertainty import auroc
from cdiffset.images import to_tensor
from data.make_sentinel_demo import (
    CORNERS,
    FACTOR,
    MATCH_FACTOR,
    TILE_PX,
    Fragment,
    Offset,
    averaged,
    find_fragments,
    locate,
    moved,
    read,
    register,
)
from data.make_sentinel_demo import tile_corners as corners_of

BINS_PX = (0, 4, 8, 16, np.inf)  # largest offset anywhere in a fragment, at 10 m
# What is not registered is moved as well, by half a px at 10 m: resampling smooths, which alone may change a score.
NOWHERE = Offset(np.full(2, 0.25), np.zeros((2, 2)))


def scores(model: Model, sar: np.ndarray, eo: np.ndarray, corners: list[tuple[int, int]]) -> np.ndarray:
    """SAR amplitude [H, W] and EO [H, W, 3] at 40 m => the audit's score of every tile [n], as audit.csv has it."""
    cut = [np.s_[y : y + TILE_PX, x : x + TILE_PX] for y, x in corners]
    tiles = [np.stack([image[place].round() for place in cut]) for image in (sar[..., None].repeat(3, -1), eo)]
    return residuals(model, *map(to_tensor, tiles)).mean((1, 2, 3)).numpy()


def audit_fragment(model: Model, number: int, files: tuple[Path, Path], held_out: list[Fragment]) -> dict:
    """=> {"part", "offset" in px at 10 m or None, "came": scores, "registered": scores or None}."""
    fragment = locate(number)
    intensity, eo = read(files[0], "L") ** 2, read(files[1], "RGB")
    coarse = (averaged(image, MATCH_FACTOR) for image in (intensity, eo))
    offset = None if fragment.part == "mismatched" else register(*coarse)
    corners = corners_of(fragment, offset or NOWHERE, held_out)
    found = {"part": fragment.part, "offset": None, "registered": None}
    sar = np.sqrt(averaged(intensity, FACTOR))
    found["came"] = scores(model, sar, averaged(moved(eo, NOWHERE), FACTOR), corners)
    if offset is not None:
        found["offset"] = MATCH_FACTOR * float(np.abs(offset.at(CORNERS)).max())
        found["registered"] = scores(model, sar, averaged(moved(eo, offset), FACTOR), corners)
    return found


def offset_table(rows: list[dict]) -> str:
    """Registered fragments by how far their EO was moved."""
    lines = []
    for low, high in zip(BINS_PX[:-1], BINS_PX[1:], strict=True):
        chosen = [row for row in rows if low <= row["offset"] < high]
        if not chosen:
            continue
        came, registered = (np.concatenate([row[name] for row in chosen]) for name in ("came", "registered"))
        both, is_off = np.concatenate([came, registered]), np.repeat([True, False], len(came))
        span = f"{low:g} to {high:g} px" if np.isfinite(high) else f"{low:g} px and more"
        fell = sum(row["came"].mean() > row["registered"].mean() for row in chosen)
        lines.append([span, len(chosen), len(came), f"{came.mean():.3f}", f"{registered.mean():.3f}"])
        lines[-1] += [f"{np.mean(registered < came):.0%}", f"{fell} of {len(chosen)}", f"{auroc(both, is_off, ~is_off):.2f}"]
    columns = [
        "offset at 10 m",
        "fragments",
        "tiles",
        "score as it came",
        "registered",
        "tiles that fell",
        "fragments that fell",
    ]
    return table([*columns, "AUROC of tiles"], lines)


def unusable_table(rows: list[dict]) -> str:
    """Fragments that cannot be registered, and the one whose EO is of another place, beside all others as they came."""
    others = np.sort([row["came"].mean() for row in rows if row["offset"] is not None])
    groups = {
        "not registered": [row for row in rows if row["offset"] is None and row["part"] != "mismatched"],
        "EO of another place": [row for row in rows if row["part"] == "mismatched"],
    }
    lines = [["registered, as they came", len(others), f"{others.mean():.3f}", "–"]]
    for name, chosen in groups.items():
        values = np.array([row["came"].mean() for row in chosen])
        ranks = np.searchsorted(others, values) / len(others)
        lines.append([name, len(chosen), f"{values.mean():.3f}", f"{np.median(ranks):.0%}"])
    return table(["fragments", "n", "score as it came", "of the registered that score lower (median)"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="The audit on registered and unregistered real pairs.", allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="of a run on the demo's pairs")
    parser.add_argument("--source", type=Path, required=True, help="folder of the Optical-SAR-dataset, with sar/ and eo/")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        raise UserError(f"--source: there is no folder {args.source}")
    model, files = load_checkpoint(args.checkpoint, "cpu"), find_fragments(args.source)
    held_out = [fragment for fragment in map(locate, files) if fragment.part not in ("train", "mismatched")]
    with torch.autocast("cpu", torch.bfloat16):
        rows = [
            audit_fragment(model, number, files[number], held_out) for number in tqdm(files, desc="auditing", unit="fragment")
        ]
    registered = [row for row in rows if row["offset"] is not None]
    for title, is_seen in (("held out", False), ("seen in training, registered", True)):
        print(f"\nFragments {title}:\n\n{offset_table([row for row in registered if (row['part'] == 'train') == is_seen])}")
    print(f"\nFragments that cannot be used:\n\n{unusable_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
