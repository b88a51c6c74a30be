"""Make the real pairs of the demo from the Optical-SAR-dataset: registered, averaged to 40 m, cut into tiles, split by place.

    python data/make_sentinel_demo.py --source Optical-SAR-dataset --output data/sentinel_demo

reads sar/NNN.* and eo/NNN.*, fragments of 1,024 x 1,024 px at 10 m (Sentinel-1 VH, Sentinel-2 RGB), and writes
{train,test,unseen}/{sar,eo}/NNN_rROW_cCOL.webp, tiles of 64 x 64 px at 40 m, with the table scenes.csv and checksums.sha256.

The EO is moved onto the SAR, matched at 20 m, by an offset that varies linearly over a fragment: height displaces the SAR
towards its sensor. A fragment is left out where two halves of it give different offsets. The parts do not touch: whole
fragments are held out, and what lies nearer to one than GUARD_PX is left out of the training.
"""

import csv
import hashlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter, gaussian_gradient_magnitude, map_coordinates, spline_filter
from scipy.optimize import minimize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from cdiffset.errors import Parser, UserError, run  # noqa: E402
from cdiffset.images import list_images, require_writable, write_text, written_whole  # noqa: E402

FRAGMENT_PX = 1024  # at 10 m
MATCH_FACTOR = 2  # fragments are matched at 20 m
FACTOR = 4  # tiles are at 40 m, where speckle is averaged over 16 px
SIDE_PX = FRAGMENT_PX // FACTOR
TILE_PX = 64  # at 40 m
GUARD_PX = 64  # at 40 m: one tile
QUALITY = {"sar": 80, "eo": 90}  # of WebP

# MGRS tile: zone, number of the first fragment, fragments in a row, and the first one's y, x in px at 10 m in the zone's frame.
# Fragments of neighbouring numbers continue one another; the ground that T11SLT and T11SMT share gives their distance.
GRIDS = {"T14RNT": ("T14", 219, 12, 0, 0), "T11SMT": ("T11", 127, 12, 1865, 12111), "T11SLT": ("T11", 0, 13, 0, 0)}
PARTS = {
    "test": (35, 73, 76, 128, 246, 253, 262, 281),  # water, town, field and hills, of both regions
    "unseen": (156, 161, 168, 172, 196, 207),  # farms, dry hills and warehouses inland
    "unused": (145, 155, 157, 162, 169, 171, 208),  # the rest of that inland region
    "mismatched": (130,),  # its EO is that of fragment 142
}  # all others: train
WRITTEN = ("train", "test", "unseen")

BLOCKS, REACH = 8, 8  # fragments are matched by 8 x 8 blocks, over offsets of up to 8 px at 20 m
MAX_SLOPE = 2.0  # px at 20 m from a fragment's centre to its border
AGREE_PX = 2.0  # at 20 m: two halves of the blocks may differ by so much, anywhere in the fragment


class Fragment(NamedTuple):
    number: int
    mgrs_tile: str
    part: str
    zone: str
    origin: tuple[int, int]  # y, x in px at 40 m, in the zone's frame

    def gap(self, other: "Fragment", corner: tuple[int, int] = (0, 0), side: int = SIDE_PX) -> float:
        """Distance of a square of this fragment, from `corner` on, to another fragment, px at 40 m; below 0: they overlap."""
        if self.zone != other.zone:
            return np.inf
        starts = np.add(self.origin, corner)
        return float(np.maximum(np.subtract(other.origin, starts + side), starts - np.add(other.origin, SIDE_PX)).max())


class Offset(NamedTuple):
    """By how much the EO has to move, in px at 20 m; `centre` (down, along), `slope` [2 axes, 2 directions] to the border."""

    centre: np.ndarray
    slope: np.ndarray

    def at(self, places: np.ndarray) -> np.ndarray:
        """Places [n, 2], -1 to 1 from border to border => offsets [n, 2]."""
        return self.centre + places @ self.slope.T


CORNERS = np.array([(y, x) for y in (-1, 1) for x in (-1, 1)], float)


# --------------------------------------------------------------------------------------------------------- registration
def edges(image: np.ndarray) -> np.ndarray:
    """[H, W] => strength of its edges [H, W], of zero mean and unit variance in every neighbourhood."""
    strength = gaussian_gradient_magnitude(image, 1.0)
    strength = np.log(strength + 0.1 * strength.mean())
    strength -= gaussian_filter(strength, 10)
    return strength / np.sqrt(gaussian_filter(strength**2, 10) + 1e-6)


def correlations(sar: np.ndarray, eo: np.ndarray) -> np.ndarray:
    """Edges [H, W] => correlation of every block at every offset of the EO [BLOCKS, BLOCKS, 2 REACH + 1, 2 REACH + 1]."""
    side, span = len(sar) // BLOCKS, 2 * REACH + 1
    found = np.empty((BLOCKS, BLOCKS, span, span))
    for down in range(span):
        for along in range(span):
            product = sar * np.roll(eo, (down - REACH, along - REACH), (0, 1))
            found[:, :, down, along] = product.reshape(BLOCKS, side, BLOCKS, side).mean((1, 3))
    return found


def fit_offset(correlation: np.ndarray, places: np.ndarray, is_linear: bool) -> Offset:
    """The offset that blocks [n, 2 REACH + 1, 2 REACH + 1] at `places` [n, 2] agree on best, linear or the same everywhere."""
    smooth = gaussian_filter(correlation, (0, 0.7, 0.7))
    blocks, spline = np.arange(len(places)), spline_filter(smooth)

    def offset_of(values: np.ndarray) -> Offset:
        return Offset(values[:2], values[2:].reshape(2, 2) if is_linear else np.zeros((2, 2)))

    def cost(values: np.ndarray) -> float:
        offset = offset_of(values)
        where = [blocks, *(offset.at(places) + REACH).T]
        too_steep = np.maximum(np.abs(offset.slope) - MAX_SLOPE, 0).sum()
        return too_steep - map_coordinates(spline, where, mode="mirror", prefilter=False).mean()

    mean = smooth.mean(0)
    start = np.zeros(6 if is_linear else 2)
    start[:2] = np.subtract(np.unravel_index(mean.argmax(), mean.shape), REACH)
    simplex = start + np.vstack([np.zeros(len(start)), np.eye(len(start))])
    return offset_of(minimize(cost, start, method="Nelder-Mead", options={"initial_simplex": simplex, "maxiter": 2000}).x)


def register(sar: np.ndarray, eo: np.ndarray) -> Offset | None:
    """SAR intensity [H, W] and EO [H, W, 3] of one grid => by how much the EO has to move.

    Linear over the fragment where two halves of its blocks, like a chessboard's, give the same to AGREE_PX; else constant where
    they agree on that; else None.
    """
    correlation = correlations(edges(np.log(gaussian_filter(sar, 0.7) + 1)), edges(eo.mean(-1)))
    row, column = np.indices((BLOCKS, BLOCKS))
    places = np.stack([row, column], -1) * 2 / BLOCKS - 1 + 1 / BLOCKS
    is_dark = (row + column) % 2 == 0
    for is_linear in (True, False):
        dark, light = (fit_offset(correlation[half], places[half], is_linear).at(CORNERS) for half in (is_dark, ~is_dark))
        if np.abs(dark - light).max() <= AGREE_PX:
            return fit_offset(correlation.reshape(-1, *correlation.shape[2:]), places.reshape(-1, 2), is_linear)
    return None


def moved(eo: np.ndarray, offset: Offset) -> np.ndarray:
    """EO [H, W, 3] at 10 m => the same where it belongs by `offset`."""
    middle, half = (FRAGMENT_PX - 1) / 2, FRAGMENT_PX / 2
    slope = MATCH_FACTOR * offset.slope / half  # px at 10 m per px
    matrix, shift = np.eye(2) - slope, slope @ (middle, middle) - MATCH_FACTOR * offset.centre
    bands = [affine_transform(band, matrix, shift, mode="nearest") for band in np.moveaxis(eo, -1, 0)]
    return np.stack(bands, -1).clip(0, 255)


# ---------------------------------------------------------------------------------------------------------------- tiles
def averaged(image: np.ndarray, factor: int) -> np.ndarray:
    """[H, W, ...] => means of its squares of factor x factor px."""
    height, width, *rest = image.shape
    return image.reshape(height // factor, factor, width // factor, factor, *rest).mean((1, 3))


def locate(number: int) -> Fragment:
    mgrs_tile, (zone, first, columns, y, x) = next((name, grid) for name, grid in GRIDS.items() if number >= grid[1])
    row, column = divmod(number - first, columns)
    origin = ((y + row * FRAGMENT_PX) // FACTOR, (x + column * FRAGMENT_PX) // FACTOR)
    part = next((name for name, numbers in PARTS.items() if number in numbers), "train")
    return Fragment(number, mgrs_tile, part, zone, origin)


def tile_corners(fragment: Fragment, offset: Offset, held_out: list[Fragment]) -> list[tuple[int, int]]:
    """Upper left corners (y, x) in px at 40 m of the tiles of a fragment that the moved EO covers and no guard band forbids.

    Where the EO was moved far, neighbouring tiles share a few px.
    """
    margin = int(np.ceil(np.abs(offset.at(CORNERS)).max() * MATCH_FACTOR / FACTOR))
    starts = np.linspace(margin, SIDE_PX - margin - TILE_PX, SIDE_PX // TILE_PX).round().astype(int).tolist()
    corners = [(y, x) for y in starts for x in starts]
    if fragment.part != "train":
        return corners
    return [corner for corner in corners if all(fragment.gap(other, corner, TILE_PX) >= GUARD_PX for other in held_out)]


def find_fragments(source: Path) -> dict[int, tuple[Path, Path]]:
    """=> {number: (SAR file, EO file)}."""
    files = [
        {int(path.stem): source / kind / path for path in list_images(source / kind) if path.stem.isdecimal()}
        for kind in ("sar", "eo")
    ]
    if not files[0] or files[0].keys() != files[1].keys():
        raise UserError(
            f"--source: {source}: expected the same numbers in sar/ and eo/, found {len(files[0])} and {len(files[1])} files"
        )
    return {number: (files[0][number], files[1][number]) for number in sorted(files[0])}


def read(path: Path, mode: str) -> np.ndarray:
    with Image.open(path) as image:
        if image.size != (FRAGMENT_PX, FRAGMENT_PX):
            raise UserError(f"{path}: expected {FRAGMENT_PX} x {FRAGMENT_PX} px, found {image.width} x {image.height}")
        return np.asarray(image.convert(mode), np.float64)


def make(source: Path, output: Path) -> list[dict]:
    """Write the tiles => a row for each fragment, for scenes.csv."""
    files = find_fragments(source)
    fragments = [locate(number) for number in files]
    held_out = [fragment for fragment in fragments if fragment.part not in ("train", "mismatched")]
    rows = []
    for fragment in tqdm(fragments, desc="cutting", unit="fragment", mininterval=1):
        sar_file, eo_file = files[fragment.number]
        row = {"fragment": f"{fragment.number:03}", "mgrs_tile": fragment.mgrs_tile, "part": fragment.part, "tiles": 0}
        row |= dict(zip(("y", "x"), fragment.origin, strict=True))
        rows.append(row)
        if fragment.part not in WRITTEN:
            continue
        intensity, eo = read(sar_file, "L") ** 2, read(eo_file, "RGB")
        if (offset := register(averaged(intensity, MATCH_FACTOR), averaged(eo, MATCH_FACTOR))) is None:
            row["part"] = "not registered"
            continue
        row |= {"offset_px": f"{np.abs(offset.at(CORNERS)).max():.2f}"}
        images = {"sar": np.sqrt(averaged(intensity, FACTOR)), "eo": averaged(moved(eo, offset), FACTOR)}
        for y, x in tile_corners(fragment, offset, held_out):
            row["tiles"] += 1
            for kind, image in images.items():
                tile = Image.fromarray(image[y : y + TILE_PX, x : x + TILE_PX].round().astype(np.uint8))
                with written_whole(output / fragment.part / kind / f"{fragment.number:03}_r{y:03}_c{x:03}.webp") as temporary:
                    tile.save(temporary, "WEBP", quality=QUALITY[kind], method=6)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Make the real pairs of the demo.", allow_abbrev=False)
    parser.add_argument("--source", type=Path, required=True, help="folder of the Optical-SAR-dataset, with sar/ and eo/")
    parser.add_argument("--output", type=Path, default=Path("data/sentinel_demo"), help="[%(default)s]")
    args = parser.parse_args(argv)
    require_writable("--output", args.output)
    if existing := [part for part in WRITTEN if (args.output / part).exists()]:
        raise UserError(f"--output: {args.output / existing[0]} exists: remove it, or choose another folder")
    rows = make(args.source, args.output)
    table = io.StringIO()
    writer = csv.DictWriter(
        table, ["fragment", "mgrs_tile", "part", "y", "x", "offset_px", "tiles"], restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_text(args.output / "scenes.csv", table.getvalue())
    tiles = sorted(path for part in WRITTEN for path in (args.output / part).rglob("*.webp"))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(args.output).as_posix()}\n" for path in tiles]
    write_text(args.output / "checksums.sha256", "".join(sums))
    for part in WRITTEN:
        found = [row for row in rows if row["part"] == part]
        print(f"{part}: {sum(row['tiles'] for row in found)} pairs of {len(found)} fragments")
    print(f"not registered: {sum(row['part'] == 'not registered' for row in rows)} fragments")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
