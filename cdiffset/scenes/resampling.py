"""Ground sampling distances (GSD), and resampling between the grid of a scene and one of another GSD, window by window.

Both ways by a triangle of the wider pixel's size: linear interpolation onto a finer grid, an average without aliasing onto a
coarser one. No weight is negative, so that no value leaves the range of those it is made of; and a pixel has the same
weights in whatever window it is computed.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import rasterio.warp
from rasterio.transform import RPCTransformer, from_gcps

from cdiffset.errors import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_array  # slow to import, and few resample

    from cdiffset.scenes.geotiff import Scene

SEMI_MAJOR_AXIS, E2 = 6_378_137.0, 6.694379990141e-3  # m; squared eccentricity: WGS 84
SAME_GSD = 0.02  # a relative difference that is not worth resampling


def gsd_of(scene: "Scene") -> tuple[float, float] | None:
    """Metres on the ground per pixel (down the rows, along the columns) at the centre of a scene; None where that is unknown.

    Distances are those on the WGS 84 ellipsoid: in Web Mercator or a polar projection, units of the CRS are other lengths.
    Places are known by CRS and transform, by GCPs, whose best affine transform is taken, or by RPCs at their mean height.
    """
    row, column = scene.height / 2, scene.width / 2
    rows, columns = [row - 0.5, row + 0.5, row, row], [column, column, column - 0.5, column + 0.5]
    try:
        longitudes, latitudes = _lon_lat(scene, rows, columns)
    except Exception:  # a georeference that makes no sense raises errors of many kinds in GDAL and PROJ
        return None
    if not np.isfinite([longitudes, latitudes]).all():
        return None
    down, along = (_metres(longitudes[k : k + 2], latitudes[k : k + 2]) for k in (0, 2))
    return (down, along) if 0 < min(down, along) and max(down, along) < math.inf else None


def _lon_lat(scene: "Scene", rows: list[float], columns: list[float]) -> tuple[list[float], list[float]]:
    """Places in pixels, 0 at the upper left corner => degrees in WGS 84; NaN where they are unknown."""
    gcps, gcp_crs = scene.gcps
    crs, transform = (gcp_crs, from_gcps(gcps)) if gcps else (scene.crs, scene.transform)
    if not gcps and scene.rpcs is not None and (crs is None or transform.is_identity):
        with RPCTransformer(scene.rpcs) as to_ground:  # of the centres of pixels
            return to_ground.xy([each - 0.5 for each in rows], [each - 0.5 for each in columns], offset="center")
    if crs is None or transform.is_identity or not (crs.is_geographic or crs.is_projected):
        return [math.nan], [math.nan]
    x, y = zip(*(transform @ (column, row) for row, column in zip(rows, columns, strict=True)), strict=True)
    return rasterio.warp.transform(crs, "EPSG:4326", x, y)[:2]


def _metres(longitudes: list[float], latitudes: list[float]) -> float:
    """Distance of two near places in degrees, by the ellipsoid's radii of curvature between them."""
    latitude = math.radians(sum(latitudes) / 2)
    w = math.sqrt(1 - E2 * math.sin(latitude) ** 2)
    east = (longitudes[1] - longitudes[0] + 180) % 360 - 180  # the shorter way around
    return math.hypot(
        math.radians(latitudes[1] - latitudes[0]) * SEMI_MAJOR_AXIS * (1 - E2) / w**3,
        math.radians(east) * SEMI_MAJOR_AXIS / w * math.cos(latitude),
    )


def pixel_ratio_to(gsd: tuple[float, float], wanted: float) -> tuple[float, float]:
    """Pixels of a scene per pixel of a grid of `wanted` metres, down and along; 1 where they hardly differ."""
    return tuple(1.0 if abs(wanted / each - 1) < SAME_GSD else wanted / each for each in gsd)


def resampled_size(size: tuple[int, int], pixel_ratio: tuple[float, float]) -> tuple[int, int]:
    """(height, width) of the grid that covers all of `size` with pixels of so many of its pixels."""
    return tuple(math.ceil(round(side / ratio, 6)) for side, ratio in zip(size, pixel_ratio, strict=True))


def weights(first: int, last: int, step: float, length: int) -> "tuple[int, csr_array]":
    """Pixels `first` to `last` of an axis, each `step` pixels of another of `length` => (first pixel used, weights [n, m]).

    Each row adds up to 1; at an end the weights of what lies beyond go to what is there.
    """
    from scipy.sparse import csr_array

    centres = (np.arange(first, last) + 0.5) * step - 0.5
    reach = max(step, 1.0)
    places = np.floor(centres - reach).astype(np.int64)[:, None] + np.arange(1, 2 * math.ceil(reach) + 2)
    taps_weight = np.maximum(0, 1 - np.abs(places - centres[:, None]) / reach) * ((places >= 0) & (places < length))
    taps_weight /= taps_weight.sum(1, keepdims=True)
    rows, taps = np.nonzero(taps_weight)
    used = places[rows, taps]
    start = int(used.min())
    return start, csr_array((taps_weight[rows, taps], (rows, used - start)), (len(centres), int(used.max()) + 1 - start))


def apply_weights(down: "csr_array", along: "csr_array", values: np.ndarray) -> np.ndarray:
    """Values [..., h, w] => float64 [..., h', w']."""
    flat = values.reshape(-1, *values.shape[-2:])
    resampled = np.stack([(along @ (down @ band).T).T for band in flat])
    return resampled.reshape(*values.shape[:-2], *resampled.shape[-2:])


def resample_strips(
    strips: Iterator[tuple[int, np.ndarray]],
    size: tuple[int, int],  # of the grid of the strips
    pixel_ratio: tuple[float, float],  # its pixels per pixel of the grid wanted, down and along
    wanted: tuple[int, int],  # size of that
    rows: int,  # most rows of a strip that is given back
) -> Iterator[tuple[int, np.ndarray]]:
    """Strips (first row, [C, n, W]) from top to bottom => the same of another grid, float32, as soon as enough is known."""
    start, along = weights(0, wanted[1], pixel_ratio[1], size[1])
    reach, held, top, done = max(pixel_ratio[0], 1.0), None, 0, 0
    for first, strip in strips:
        known = min(first + strip.shape[1], size[0])
        strip = strip[:, : max(0, known - first), start : start + along.shape[1]]
        held = strip if held is None else np.concatenate([held, strip], 1)
        ready = wanted[0] if known == size[0] else math.floor((known - reach + 0.5) / pixel_ratio[0] - 0.5) + 1
        while done < min(ready, wanted[0]):
            last = min(done + rows, ready, wanted[0])
            begin, down = weights(done, last, pixel_ratio[0], size[0])
            part = held[:, begin - top : begin - top + down.shape[1]]
            yield done, apply_weights(down, along, part).astype(np.float32)
            done = last
        if done < wanted[0]:  # let go of what no later row needs
            begin = min(weights(done, done + 1, pixel_ratio[0], size[0])[0], known)
            held, top = held[:, begin - top :], begin


def require_gsd(source: "Scene", stated: float | None, option: str) -> tuple[float, float]:
    """`gsd_of`, or what the user states; UserError where both are unknown."""
    if stated:
        return stated, stated
    if (found := gsd_of(source)) is None:
        raise UserError(f"{option}: {source.name} does not record its GSD (no CRS, GCPs or RPCs): give it by --gsd METRES")
    return found
