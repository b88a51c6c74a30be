"""Tiles that cover a scene, the smooth weights by which they are fused, and the noise of each place. NumPy alone."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

NOISE_BLOCK = 64  # latent cells a side; part of what a seed means


class Grid(NamedTuple):
    """Tiles of one size that cover [height, width], row by row; they overlap by at least what was asked for."""

    height: int
    width: int
    tile: tuple[int, int]  # height, width
    tops: list[int]
    lefts: list[int]

    def windows(self) -> list[tuple[slice, slice]]:
        height, width = self.tile
        return [np.s_[top : top + height, left : left + width] for top in self.tops for left in self.lefts]

    def times(self, factor: int) -> "Grid":
        """The same tiles on a grid `factor` times as fine."""
        finer = ([factor * start for start in starts] for starts in (self.tops, self.lefts))
        return Grid(factor * self.height, factor * self.width, tuple(factor * side for side in self.tile), *finer)


def make_grid(height: int, width: int, tile: int, overlap: int) -> Grid:
    """Tiles of side `tile`, or of the scene's side where that is less, spread evenly."""
    sides = min(tile, height), min(tile, width)
    tops, lefts = (_starts(length, side, overlap) for length, side in zip((height, width), sides, strict=True))
    return Grid(height, width, sides, tops, lefts)


def _starts(length: int, side: int, overlap: int) -> list[int]:
    if length == side:
        return [0]
    steps = -(-(length - side) // (side - overlap))
    return [(length - side) * k // steps for k in range(steps + 1)]


def blending_weights(length: int, side: int, starts: list[int]) -> np.ndarray:
    """Weights [tiles, side] along one axis, float64: a raised cosine over each tile, and of all tiles at a place together 1."""
    window = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + side] += window
    return np.stack([window / total[start : start + side] for start in starts])


def fuse(grid: Grid, tiles: Iterable[np.ndarray]) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Tiles [C, th, tw] in the order of the grid => (rows, columns, piece [C, rows, columns] float32), each once it is final.

    Summed in float64, so that tiles that agree give what they agree on to the last bit. Held: one tile, and the rows that two
    rows of tiles share, over the width of the scene.
    """
    (height, width), tiles = grid.tile, iter(tiles)
    down = blending_weights(grid.height, height, grid.tops)
    across = blending_weights(grid.width, width, grid.lefts)
    above = None
    for row, (top, below) in enumerate(zip(grid.tops, [*grid.tops[1:], grid.height], strict=True)):
        weights, done = down[row][:, None] * across[:, None, :], below - top  # [columns of tiles,th,tw], rows
        for column, (left, right) in enumerate(zip(grid.lefts, [*grid.lefts[1:], grid.width], strict=True)):
            tile = next(tiles) * weights[column]
            if column == 0:
                summed, kept = np.zeros(tile.shape), np.empty((len(tile), height - done, grid.width))
            summed += tile
            ready = summed[:, :, : right - left]
            if above is not None:
                ready[:, : above.shape[1]] += above[:, :, left:right]
            yield slice(top, below), slice(left, right), ready[:, :done].astype(np.float32)
            kept[:, :, left:right] = ready[:, done:]
            summed[:, :, : width - right + left] = summed[:, :, right - left :]
            summed[:, :, width - right + left :] = 0
        above = kept


def strips(pieces: Iterable[tuple[slice, slice, np.ndarray]], width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces from left to right and top to bottom => (first row, strip [C, n, width])."""
    row = []
    for rows, columns, piece in pieces:
        row.append(piece)
        if columns.stop == width:
            yield rows.start, np.concatenate(row, axis=2)
            row = []


def noise_field(seed: int, channels: int, rows: slice, columns: slice) -> np.ndarray:
    """A window of the noise of a scene => float32 [C, rows, columns].

    Each block is drawn by the seed and its place alone (Philox, keyed by both): whatever the scene's size, a place gets the
    same noise.
    """
    side = NOISE_BLOCK

    def block(down: int, across: int) -> np.ndarray:
        philox = np.random.Philox(key=np.array([seed, down << 32 | across], np.uint64))
        return np.random.Generator(philox).standard_normal((channels, side, side), np.float32)

    downs, acrosses = (range(axis.start // side, -(-axis.stop // side)) for axis in (rows, columns))
    blocks = np.block([[block(down, across) for across in acrosses] for down in downs])
    top, left = rows.start % side, columns.start % side
    return blocks[:, top : top + rows.stop - rows.start, left : left + columns.stop - columns.start]
