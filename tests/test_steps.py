"""The benchmark of fewer steps: its measures against hand computations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import steps
from benchmarks.measures import TEST, draw_scenes
from data.simulate import Simulation
from utils import PairMetrics


def test_the_gradient_energy_of_a_ramp_and_of_a_checkerboard():
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    assert steps.gradient_energy((2 * rows + 3 * columns)[None, None]) == pytest.approx(4 + 9)
    assert steps.gradient_energy(((rows + columns) % 2)[None, None]) == pytest.approx(2)


def test_measures_of_a_known_result():
    """Moved by 0.4, 0.2 of the range, in half of the pictures, with twice the variance."""
    scenes = draw_scenes(Simulation(), TEST, range(12), 0)
    generator = torch.Generator().manual_seed(0)
    paper = steps.Result(
        scenes.eo + 0.1 * torch.randn(scenes.eo.shape, generator=generator), torch.rand(12, 1, 16, 16) + 0.1, 1.0
    )
    moved = paper.eo.clone()
    moved[:6] += 0.4
    other = replace(paper, eo=moved, sigma2=2 * paper.sigma2)
    itself, found = (steps.measures(each, paper, scenes, PairMetrics(with_lpips=False)) for each in (paper, other))
    assert (itself["to_paper"], itself["map_to_paper"], itself["level"]) == (np.inf, pytest.approx(1), pytest.approx(1))
    assert found["to_paper"] == pytest.approx(-10 * np.log10(0.04 / 2), abs=1e-4)
    assert (found["map_to_paper"], found["level"]) == (pytest.approx(1), pytest.approx(2))
    assert found["detail"] == pytest.approx(steps.gradient_energy(moved) / steps.gradient_energy(scenes.eo))
