"""Three ways to ask the model for more than it was trained to say, tried by benchmarks/real_confidence.py on planted changes.

All maps are [N, 1, h or H, w or W]; more means more suspicious. `sar` and `eo` are [N, 3, H, W] in [-1, 1].
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import Model

# isort: split
import torch
from torch import nn
from torch.nn.functional import interpolate
from tqdm import trange

from benchmarks.measures import BATCH_SIZE, residuals
from cdiffset.auditing.residual import DRAWS, TIMESTEPS, squared_residual
from cdiffset.pipeline import encode

CELL_PX = 8  # side of the squares that are blanked
WIDTH = 32  # channels of the error network
USUAL_ERROR = 20.0  # 8-bit units, what an untrained network predicts, nearly


def blanked_contrast(model: Model, sar: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
    """The audit's residual of the EO given the SAR, less that given a SAR whose place is blanked.

    Positive where what the SAR shows makes the EO less likely than its surroundings alone. Every fourth square of CELL_PX is
    blanked at once, by the tile's mean, so that four more residuals serve all places.
    """
    plain = residuals(model, sar, eo)
    without = torch.zeros_like(plain)
    rows, columns = (torch.arange(side) // CELL_PX % 2 for side in sar.shape[-2:])
    mean = sar.mean((2, 3), keepdim=True)
    for phase in range(4):
        blank = (rows[:, None] == phase // 2) & (columns == phase % 2)  # [H,W]
        residual = residuals(model, torch.where(blank, mean, sar), eo)
        inside = interpolate(blank[None, None].float(), plain.shape[-2:], mode="nearest")
        without += inside * residual
    return plain - without


@torch.no_grad()
def swapped_surprise(model: Model, sar: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
    """How unlikely the SAR is given the EO: the Gaussian NLL, up to a constant, by a model trained in the other direction."""
    generator, parts = torch.Generator().manual_seed(0), []
    noises = [torch.randn(1, *encode(model.vae, sar[:1]).shape[1:], generator=generator) for _ in range(DRAWS)]
    for pair in zip(sar.split(BATCH_SIZE), eo.split(BATCH_SIZE), strict=True):
        z_sar, z_eo = (encode(model.vae, pixels) for pixels in pair)
        surprise = torch.zeros_like(z_eo[:, :1])
        for noise in noises:
            squared, sigma2 = squared_residual(
                model.unet, model.scheduler, z_eo, z_sar, noise, TIMESTEPS[0], model.prompt_embedding
            )
            surprise += (squared / sigma2 + sigma2.log()) / len(noises)
        parts.append(surprise)
    return torch.cat(parts)


class ErrorNetwork(nn.Module):
    """Features at the pixels [N, C, H, W] => expected |error| [N, 1, H, W] in 8-bit units."""

    def __init__(self, channels: int):
        super().__init__()
        layers, before = [], channels
        for dilation in (1, 2, 4, 8, 1):
            layers += [nn.Conv2d(before, WIDTH, 3, padding=dilation, dilation=dilation), nn.SiLU()]
            before = WIDTH
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return USUAL_ERROR * self.layers(features).clamp(-4, 4).exp()


def error_features(sar: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor, sigma2: torch.Tensor) -> torch.Tensor:
    """SAR, mean picture of the samples [N, 3, H, W], their spread [N, 1, H, W] and σ² [N, 1, h, w] => [N, 6, H, W]."""
    at_pixels = interpolate(sigma2.float(), sar.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([sar[:, :1], mean, 10 * spread, at_pixels.log()], 1)


def train_error_network(features: torch.Tensor, error: torch.Tensor, updates: int, seed: int) -> ErrorNetwork:
    """Fit it to errors [N, 1, H, W] in 8-bit units by the likelihood of an exponential distribution, log s + e / s."""
    torch.manual_seed(seed)
    network, generator = ErrorNetwork(features.shape[1]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in trange(updates, desc="error network", unit="it", mininterval=10):
        picked = torch.randint(len(features), (8,), generator=generator)
        expected = network(features[picked])
        (expected.log() + error[picked] / expected).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return network.eval()


@torch.no_grad()
def predict_error(network: ErrorNetwork, features: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):  # which would leave few distinct values
        return torch.cat([network(chunk) for chunk in features.float().split(BATCH_SIZE)])
