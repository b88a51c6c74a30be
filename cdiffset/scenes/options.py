"""The options of scenes: tiles, and how the numbers of a SAR file are read. No heavy import, so that --help is quick."""

import argparse
from dataclasses import dataclass

from cdiffset.errors import UserError
from cdiffset.inference.options import check_limits
from cdiffset.scenes.radiometry import CHANNELS, SCALES, RadiometryOptions

TILE, OVERLAP = 1024, 128  # px


@dataclass(frozen=True)
class TileSettings:
    """The tiles that scenes are fused of, in px of the grid that is translated."""

    tile: int  # side, a multiple of 64
    overlap: int  # at least, a multiple of 8


def add_scene_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "scenes",
        "Georeferenced rasters of any size and TIFFs with a side above --tile become GeoTIFFs on their own grid. With any of "
        "these options every file does.",
    )
    group.add_argument("--tile", type=int, help=f"px, a multiple of 64; larger scenes are fused of tiles [{TILE}]")
    group.add_argument("--overlap", type=int, help=f"of tiles, px, a multiple of 8, at most half a tile [{OVERLAP}]")
    add_radiometry_options(group, "[the checkpoint's, else ")
    group.add_argument("--gsd", type=metres, metavar="METRES", help="per pixel of the scene [what the file says]")
    group.add_argument(
        "--resample-gsd", type=metres, nargs="?", const=True, metavar="METRES", help="translate at the GSD of the "
        "checkpoint's training images, or at this one; results come back on the scene's own grid [no resampling]"
    )  # fmt: skip


def add_radiometry_options(group, default: str = "[") -> None:
    """How SAR scenes are read: what test.py and data/make_chips.py have in common."""
    group.add_argument(
        "--bands", help=f"1 to 4 bands by number or name, e.g. VV,VH; also of files of one product {default}all but alpha and "
        "auxiliary ones]"
    )  # fmt: skip
    presets = "; ".join(f"{name}: {meaning}" for name, (_, meaning) in CHANNELS.items())
    group.add_argument(
        "--channels", choices=CHANNELS, help=f"how bands become three channels {default}by their number]. {presets}"
    )
    group.add_argument(
        "--scale", choices=("auto", *SCALES), help="what the numbers are: dn and amplitude are stretched as they are, "
        f"intensity and db as amplitudes; auto: by the numbers, units and names, and says why {default}dn]"
    )  # fmt: skip
    group.add_argument(
        "--stretch", metavar="RULE", help="percentile:LOW,HIGH of each band of the whole scene; fixed:MIN,MAX, or a pair for "
        "each band; folder: percentiles 1 and 99 of all scenes together; dataset: those of the training images, kept with the "
        f"checkpoint {default}8-bit as it is, other percentile:1,99]"
    )  # fmt: skip
    group.add_argument(
        "--despeckle", metavar="FILTER", help="lee:SIZE,LOOKS: Lee filter of SIZE px, for a product of so many looks, e.g. "
        f"lee:7,4.4; multilook:SIZE: mean intensity of SIZE px {default}none]"
    )  # fmt: skip
    group.add_argument(
        "--nodata", type=float, metavar="VALUE", help="a number of the file that means no data, beside what the file declares "
        "itself, masks, NaN and Inf [none: undeclared zeros are data]"
    )  # fmt: skip


def metres(text: str) -> float:
    """A length of more than 0; argparse reports a ValueError as a mistake on the command line."""
    if not 0 < float(text) < 1e5:
        raise ValueError
    return float(text)


def scene_options_given(args: argparse.Namespace) -> list[str]:
    """The scene options on the command line, which have any file translated as a scene."""
    tiles = [f"--{name}" for name in ("tile", "overlap") if getattr(args, name) is not None]
    return tiles + radiometry_options(args).given()


def radiometry_options(args: argparse.Namespace) -> RadiometryOptions:
    return RadiometryOptions(**{name: getattr(args, name) for name in RadiometryOptions.__dataclass_fields__})


def tile_settings(args: argparse.Namespace) -> TileSettings:
    tile = TILE if args.tile is None else args.tile
    settings = TileSettings(tile, min(OVERLAP, tile // 2) if args.overlap is None else args.overlap)
    check_limits(settings, {"tile": (64, None), "overlap": (0, tile // 2)})
    for name, step in (("tile", 64), ("overlap", 8)):
        if getattr(settings, name) % step:
            raise UserError(f"--{name}: expected a multiple of {step}, found {getattr(settings, name)}")
    return settings
