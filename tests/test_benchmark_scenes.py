"""The seam measure on pictures whose seams are known."""

import numpy as np
import pytest

from benchmarks.scenes import borders, seam_ratio
from cdiffset.scenes.tiles import make_grid


def test_borders_are_where_tiles_begin_and_end():
    grid = make_grid(100, 64, 64, 16)  # rows 0 to 63 and 36 to 99
    assert borders(grid, 1) == {35, 63} and borders(grid, 2) == set()


@pytest.mark.parametrize("step", [0, 30])
def test_a_step_at_the_borders_raises_the_ratio_by_its_energy(step):
    picture = np.random.default_rng(0).normal(0, 10, (3, 256, 256))
    for start in (64, 128, 192):
        picture[:, start:] += step
        picture[:, :, start:] += step
    grid, none = make_grid(256, 256, 64, 0), make_grid(256, 256, 256, 0)
    # Neighbours differ by a variance of 2 * 10^2, and by step^2 more where it is.
    assert seam_ratio(picture, grid, none) == pytest.approx(1 + step**2 / 200, rel=0.1)
