"""Procedural SAR-EO scene simulator: paired images with planted, exactly known temporal discrepancies.

A scene is one piece of ground at 1.5 m GSD: water, forest, crops, bare soil, urban ground, roads, buildings, tanks and piers,
which both sensors see, and ships and vehicles, which may have moved between the two acquisitions. EO is a sunlit colour
picture. SAR is the same ground by backscatter class in dB, with double bounce on the side that faces the sensor (left),
radar shadow behind, and multiplicative gamma speckle. Tanks, piers and buildings are as bright in the SAR as ships and
vehicles, so that brightness alone does not show which objects are doubtful.

    python data/simulate.py --output data/simulated --train 2048 --test 160 --size 64 --seed 0

writes train/ and test/, each with sar/, eo/, mask_sar_only/, mask_eo_only/ (8-bit PNG, one file per scene and folder).
Scene k of a split depends on (seed, split, k) and the simulation options alone.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from cdiffset.errors import run  # noqa: E402

GSD_M = 1.5
SAR_DB_RANGE = (-26.0, 10.0)  # dB shown as 0 ... 255
FOLDERS = ("sar", "eo", "mask_sar_only", "mask_eo_only")


@dataclass(frozen=True)
class Simulation:
    """What the scenes look like; the defaults are the demo's."""

    size: int = 64  # side of a scene, px
    looks: float = 4.0  # equivalent number of looks of the speckle: 1 is the noisiest
    p_sar_only: float = 0.3  # share of the ships and vehicles that only the SAR shows
    p_eo_only: float = 0.3  # share of the ships and vehicles that only the EO shows
    parcel_px: float = 26.0  # mean distance of neighbouring land parcels
    texture: float = 1.0  # strength of the EO's texture and tint, which no SAR predicts
    object_scale: float = 1.0  # size of ships, vehicles, tanks and platforms; vehicles stay on their roads up to 1.4
    contrast: float = 1.0  # EO contrast of ships and vehicles with water and roads; 0 hides them
    movable_db: float = 0.0  # added to the backscatter of ships and vehicles, dB
    movables: float = 1.0  # how often a ship or a vehicle is tried to be placed, relative to the default
    statics: float = 1.0  # how often a tank or a platform is


# Land cover: EO colour (0-255), EO texture, SAR backscatter in dB, SAR texture in dB.
WATER = ((26, 50, 74), 3.0, -20.0, 0.4)
ROAD = ((88, 88, 94), 3.0, -17.0, 0.3)
LAND = {
    "forest": ((36, 70, 38), 13.0, -6.5, 1.6),
    "crop": ((88, 132, 60), 5.0, -10.5, 0.5),
    "stubble": ((186, 166, 106), 6.0, -13.5, 0.5),
    "soil": ((136, 98, 70), 6.0, -15.5, 0.6),
    "urban": ((136, 132, 130), 7.0, -8.5, 1.2),
}
ROOFS = (((206, 208, 214), 4.0), ((170, 84, 62), -2.0), ((112, 108, 108), 1.0))  # metal, tile, bitumen: EO colour, SAR dB
SHIP_COLOURS = ((226, 222, 214), (214, 206, 190), (196, 84, 66))
VEHICLE_COLOURS = ((234, 232, 228), (226, 196, 70), (206, 214, 224))


class Canvas:
    """The ground while it is being built: EO colour, mean backscatter in dB, and what stands where."""

    def __init__(self, size: int):
        self.size = size
        self.eo = np.zeros((size, size, 3), np.float32)  # 0 ... 255
        self.db = np.zeros((size, size), np.float32)
        self.land = np.zeros((size, size), np.int8)  # -1 water, else index into LAND
        self.road = np.zeros((size, size), bool)
        self.taken = np.zeros((size, size), bool)
        self.masks = {name: np.zeros((size, size), bool) for name in ("sar_only", "eo_only", "movable", "permanent")}
        self.objects = np.zeros((size, size), np.uint16)
        self.eo_all = self.eo_none = self.eo  # the EO with every movable object, and with none: see `part_ways`

    def part_ways(self) -> None:
        """From here on, the three EO pictures are different ones: what stands now is in all of them."""
        self.eo_all, self.eo_none = self.eo.copy(), self.eo.copy()

    def cut(self, corners: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray] | None:
        """Polygon corners [n, 2] as (x, y) in px => (window of the arrays, mask in that window); None outside the scene."""
        x0, y0 = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        x1, y1 = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, self.size)
        if x0 >= x1 or y0 >= y1:
            return None
        stencil = Image.new("1", (int(x1 - x0), int(y1 - y0)))
        ImageDraw.Draw(stencil).polygon([(x - x0, y - y0) for x, y in corners.tolist()], fill=1)
        return (slice(y0, y1), slice(x0, x1)), np.array(stencil)

    def paint(self, corners: np.ndarray, colour=None, db: float | None = None) -> None:
        """Fill a polygon with an EO colour and/or a backscatter."""
        if (cut := self.cut(corners)) is None:
            return
        window, mask = cut
        if colour is not None:
            self.eo[window][mask] = colour
        if db is not None:
            self.db[window][mask] = db

    def darken(self, corners: np.ndarray, factor: float) -> None:
        if (cut := self.cut(corners)) is not None:
            self.eo[cut[0]][cut[1]] *= factor

    def is_free(self, corners: np.ndarray, allowed: np.ndarray) -> bool:
        """Whether the polygon lies inside the scene, all on allowed ground, and touches nothing that stands there."""
        if corners.min() < 1 or corners.max() > self.size - 2:
            return False
        window, mask = self.cut(corners)
        return bool((allowed[window] & ~self.taken[window])[mask].all())

    def occupy(self, corners: np.ndarray) -> None:
        window, mask = self.cut(corners)
        self.taken[window] |= mask

    def mark(self, name: str, corners: np.ndarray) -> None:
        if (cut := self.cut(corners)) is not None:
            self.masks[name][cut[0]] |= cut[1]


def smooth_noise(rng: np.random.Generator, size: int, sigma_px: float) -> np.ndarray:
    """Gaussian random field [size, size] of correlation length sigma_px, zero mean and unit variance over all fields."""
    field = gaussian_filter(rng.standard_normal((size, size)), sigma_px, mode="wrap")
    return field * (2 * np.sqrt(np.pi) * sigma_px)


def rectangle(centre, length: float, width: float, angle: float) -> np.ndarray:
    """Corners [4, 2] of a rectangle, its length along `angle` (radians)."""
    along = np.array([np.cos(angle), np.sin(angle)]) * length / 2
    across = np.array([-np.sin(angle), np.cos(angle)]) * width / 2
    return np.asarray(centre) + np.array([along + across, along - across, -along - across, -along + across])


def hull(centre, length: float, width: float, angle: float) -> np.ndarray:
    """Corners [5, 2] of a ship seen from above: a rectangle with a pointed bow."""
    outline = np.array([[0.5, 0.0], [0.22, 0.5], [-0.5, 0.42], [-0.5, -0.42], [0.22, -0.5]]) * [length, width]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.asarray(centre) + outline @ turn


def disc(centre, radius: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    return np.asarray(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def lay_ground(rng: np.random.Generator, canvas: Canvas, simulation: Simulation) -> None:
    """Water by a thresholded smooth field, land as Voronoi parcels of one cover each."""
    size = canvas.size
    spacing_px, texture = simulation.parcel_px, simulation.texture
    sites = rng.uniform(-spacing_px, size + spacing_px, (max(4, round((size / spacing_px + 2) ** 2)), 2))
    yx = np.stack(np.mgrid[:size, :size], -1).reshape(-1, 2)
    wobble = np.stack([smooth_noise(rng, size, 5.0) for _ in range(2)], -1).reshape(-1, 2) * 1.5
    parcel = cKDTree(sites).query(yx + wobble)[1].reshape(size, size)
    cover_share = rng.dirichlet([0.7, 0.7, 0.7, 0.7, 1.4])
    canvas.land[:] = rng.choice(len(LAND), len(sites), p=cover_share)[parcel]
    canvas.land[smooth_noise(rng, size, size_limited(14.0, size)) < rng.uniform(-2.0, 0.9)] = -1
    tint = rng.normal(0, 5.0, (len(sites), 3)).astype(np.float32) * texture
    for index, cover in enumerate((WATER, *LAND.values()), start=-1):
        colour, eo_texture, db, db_texture = cover
        here = canvas.land == index
        grain = smooth_noise(rng, size, 1.0)
        canvas.eo[here] = np.array(colour) + (grain * eo_texture * texture)[here][:, None]
        canvas.db[here] = db + (grain * db_texture)[here]
        if index >= 0:
            canvas.eo[here] += tint[parcel[here]]


def size_limited(sigma_px: float, size: int) -> float:
    """Keep a correlation length meaningful in a scene smaller than a few of them."""
    return min(sigma_px, size / 4)


def lay_roads(rng: np.random.Generator, canvas: Canvas) -> list[tuple[np.ndarray, float]]:
    """Straight roads across the scene, bridges over water included. Returns (a point, direction in radians) of each."""
    roads = []
    for _ in range(rng.poisson(1.1 * canvas.size / 64)):
        angle = rng.uniform(0, np.pi)
        centre = rng.uniform(0, canvas.size, 2)
        strip = rectangle(centre, 3 * canvas.size, 9.0, angle)
        if (cut := canvas.cut(strip)) is None:
            continue
        window, mask = cut
        canvas.road[window] |= mask
        canvas.paint(strip, ROAD[0], ROAD[2])
        roads.append((centre, angle))
    canvas.eo[canvas.road] += rng.normal(0, ROAD[1], (canvas.road.sum(), 1))
    return roads


def per_area(rng: np.random.Generator, canvas: Canvas, per_64px_scene: float) -> int:
    """How many tries to place an object, given how many a 64 x 64 px scene gets on average."""
    return int(rng.poisson(per_64px_scene * (canvas.size / 64) ** 2))


def place_buildings(rng: np.random.Generator, canvas: Canvas, sun: np.ndarray) -> None:
    """Roofs on urban ground and now and then on other land; double bounce to the left, radar shadow to the right."""
    urban = canvas.land == list(LAND).index("urban")
    ground = (canvas.land >= 0) & ~canvas.road
    street_angle = rng.uniform(0, np.pi / 2)
    for attempt in range(per_area(rng, canvas, 40)):
        length, width = rng.uniform(8, 18, 2)
        body = rectangle(rng.uniform(0, canvas.size, 2), length, width, street_angle)
        if not canvas.is_free(body, ground if attempt % 12 == 0 else urban & ~canvas.road):
            continue
        height_px = rng.uniform(2, 6)
        colour, roof_db = ROOFS[rng.integers(len(ROOFS))]
        canvas.darken(body + sun * height_px, 0.45)
        canvas.paint(body + [height_px, 0], db=-24.0)
        canvas.paint(body - [2.5, 0], db=rng.uniform(4, 7))
        canvas.paint(body, np.array(colour) + rng.normal(0, 6, 3), roof_db)
        canvas.occupy(body)
        canvas.mark("permanent", body)
        canvas.mark("permanent", body - [2.5, 0])


def place_bright_statics(rng: np.random.Generator, canvas: Canvas, sun: np.ndarray, simulation: Simulation) -> None:
    """Tanks on land and square platforms in water: permanent, and as bright in the SAR as what moves."""
    ground = (canvas.land >= 0) & ~canvas.road
    water = (canvas.land < 0) & ~canvas.road
    scale = simulation.object_scale
    for _ in range(per_area(rng, canvas, 3 * simulation.statics)):
        body = disc(rng.uniform(0, canvas.size, 2), rng.uniform(4.5, 7.5) * scale)
        if canvas.is_free(body, ground):
            canvas.darken(body + sun * 3, 0.45)
            canvas.paint(body + [3, 0], db=-24.0)
            canvas.paint(body, (222, 220, 214), rng.uniform(2, 5))
            canvas.occupy(body)
            canvas.mark("permanent", body)
    for _ in range(per_area(rng, canvas, 4 * simulation.statics)):
        side = rng.uniform(8, 12) * scale
        body = rectangle(rng.uniform(0, canvas.size, 2), side, side, rng.uniform(0, np.pi / 2))
        if canvas.is_free(body, water):
            canvas.paint(body, (150, 128, 100), rng.uniform(2, 5))
            canvas.occupy(body)
            canvas.mark("permanent", body)


def place_movables(rng: np.random.Generator, canvas: Canvas, roads: list, simulation: Simulation) -> None:
    """Ships on open water and vehicles along the roads, each seen by both sensors or by one of them alone."""
    water, scale = (canvas.land < 0) & ~canvas.road, simulation.object_scale
    for _ in range(per_area(rng, canvas, 10 * simulation.movables)):
        centre, length, width = rng.uniform(0, canvas.size, 2), rng.uniform(15, 25), rng.uniform(6, 8.5)
        body = hull(centre, length * scale, width * scale, rng.uniform(0, 2 * np.pi))
        if canvas.is_free(body, water):
            reveal(rng, canvas, body, SHIP_COLOURS, WATER[0], simulation)
    for centre, angle in roads:
        direction = np.array([np.cos(angle), np.sin(angle)])
        for _ in range(rng.poisson(4 * simulation.movables * canvas.size / 64)):
            spot = centre + direction * rng.uniform(-canvas.size, canvas.size)
            body = rectangle(spot, rng.uniform(10, 15) * scale, 6.0 * scale, angle)
            if canvas.is_free(body, canvas.road):
                reveal(rng, canvas, body, VEHICLE_COLOURS, ROAD[0], simulation)


def reveal(rng: np.random.Generator, canvas: Canvas, body: np.ndarray, colours, ground, simulation: Simulation) -> None:
    """Draw a movable object into one image or both, and note in the masks where only one shows it."""
    canvas.occupy(body)
    colour = np.array(colours[rng.integers(len(colours))]) + rng.normal(0, 5, 3)
    colour = simulation.contrast * colour + (1 - simulation.contrast) * np.array(ground)
    db = rng.uniform(2, 5) + simulation.movable_db
    fate = rng.uniform()
    window, mask = canvas.cut(body)
    canvas.objects[window][mask] = canvas.objects.max() + 1
    canvas.eo_all[window][mask] = colour
    in_eo = fate >= simulation.p_sar_only
    in_sar = not in_eo or fate >= simulation.p_sar_only + simulation.p_eo_only
    canvas.paint(body, colour if in_eo else None, db if in_sar else None)
    for name, applies in (("sar_only", not in_eo), ("eo_only", not in_sar), ("movable", in_sar)):
        if applies:
            canvas.mark(name, body)


def simulate_scene(rng: np.random.Generator, simulation: Simulation) -> dict[str, np.ndarray]:
    """One scene => the pair, {"eo" [S, S, 3], "sar" [S, S]}, and the truth about it, all uint8 but "objects".

    Masks [S, S], 0 or 255: "mask_sar_only", "mask_eo_only": objects that only one image shows; "mask_movable": all ships and
    vehicles that the SAR shows; "mask_permanent": tanks, platforms and buildings with their double bounce. "objects" [S, S]
    uint16: 0, or the number 1, 2, ... of the ship or vehicle, whichever image shows it. "eo_all", "eo_none" [S, S, 3]: the same
    EO acquisition if every ship and vehicle had been there, and if none had.
    """
    canvas = Canvas(simulation.size)
    sun_angle = rng.uniform(np.pi / 8, 3 * np.pi / 8)
    sun = np.array([np.cos(sun_angle), np.sin(sun_angle)])
    lay_ground(rng, canvas, simulation)
    roads = lay_roads(rng, canvas)
    place_bright_statics(rng, canvas, sun, simulation)
    place_buildings(rng, canvas, sun)
    canvas.part_ways()
    place_movables(rng, canvas, roads, simulation)
    gain, noise = rng.normal(1.0, 0.02), rng.normal(0, 1.5, canvas.eo.shape)
    eo = {name: acquire_eo(getattr(canvas, name), gain, noise) for name in ("eo", "eo_all", "eo_none")}
    masks = {f"mask_{name}": mask.astype(np.uint8) * 255 for name, mask in canvas.masks.items()}
    return {**eo, "sar": to_uint8(acquire_sar(rng, canvas.db, simulation.looks)), **masks, "objects": canvas.objects}


def acquire_eo(colour: np.ndarray, gain: float, noise: np.ndarray) -> np.ndarray:
    """Colour of the ground => an 8-bit picture of it through the blur of the optics."""
    return to_uint8(gaussian_filter(colour, (0.6, 0.6, 0)) * gain + noise)


def acquire_sar(rng: np.random.Generator, db: np.ndarray, looks: float) -> np.ndarray:
    """Mean backscatter in dB => one speckled acquisition on the 0-255 dB scale of SAR_DB_RANGE."""
    intensity = gaussian_filter(10 ** (db / 10), 0.5) * rng.gamma(looks, 1 / looks, db.shape)
    low, high = SAR_DB_RANGE
    return (10 * np.log10(np.maximum(intensity, 1e-6)) - low) / (high - low) * 255


def to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def write_split(folder: Path, split: str, count: int, seed: int, simulation: Simulation) -> None:
    """Write `count` scenes of a split; the masks and images of a scene share one file name."""
    for name in FOLDERS:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
    split_id = {"train": 0, "test": 1}[split]
    for index in tqdm(range(count), desc=f"simulating {split}", unit="scene", mininterval=1):
        scene = simulate_scene(np.random.default_rng([seed, split_id, index]), simulation)
        for name in FOLDERS:
            Image.fromarray(scene[name]).save(folder / split / name / f"{index:05d}.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulate paired SAR-EO scenes with known temporal discrepancies.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write train/ and test/ into")
    parser.add_argument("--train", type=int, default=2048, help="training scenes")
    parser.add_argument("--test", type=int, default=160, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=Simulation.size, help="side of a scene in px, at 1.5 m GSD")
    parser.add_argument("--looks", type=float, default=Simulation.looks, help="looks of the speckle; fewer are noisier")
    parser.add_argument("--p-sar-only", type=float, default=Simulation.p_sar_only, help="share of movables only in the SAR")
    parser.add_argument("--p-eo-only", type=float, default=Simulation.p_eo_only, help="share of movables only in the EO")
    parser.add_argument("--parcel-px", type=float, default=Simulation.parcel_px, help="mean distance of land parcels, px")
    parser.add_argument("--texture", type=float, default=Simulation.texture, help="strength of the EO's texture and tint")
    parser.add_argument(
        "--object-scale", type=float, default=Simulation.object_scale, help="size of movables, tanks, platforms"
    )
    parser.add_argument("--contrast", type=float, default=Simulation.contrast, help="EO contrast of movables with their ground")
    parser.add_argument("--movable-db", type=float, default=Simulation.movable_db, help="dB added to the movables in the SAR")
    parser.add_argument("--movables", type=float, default=Simulation.movables, help="tries to place ships and vehicles")
    parser.add_argument("--statics", type=float, default=Simulation.statics, help="tries to place tanks and platforms")
    args = parser.parse_args(argv)
    if args.size < 32 or min(args.looks, args.object_scale) <= 0 or args.parcel_px < 4:
        parser.error("--size must be at least 32, --parcel-px 4, --looks and --object-scale above 0")
    if min(args.train, args.test, args.seed, args.texture, args.contrast, args.movables, args.statics) < 0:
        parser.error("--train, --test, --seed, --texture, --contrast, --movables and --statics must not be negative")
    if min(args.p_sar_only, args.p_eo_only) < 0 or args.p_sar_only + args.p_eo_only > 1:
        parser.error("--p-sar-only and --p-eo-only must be shares from 0 to 1 that add up to at most 1")
    simulation = Simulation(**{field.name: getattr(args, field.name) for field in fields(Simulation)})
    for split, count in (("train", args.train), ("test", args.test)):
        write_split(args.output, split, count, args.seed, simulation)
    record = {"seed": args.seed, "gsd_m": GSD_M, "train": args.train, "test": args.test, **asdict(simulation)}
    (args.output / "simulation.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{args.train} training and {args.test} held-out scenes of {args.size} x {args.size} px in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
