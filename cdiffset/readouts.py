"""How sampling steps, when σ² is read, and what becomes of several samples: names and constants, for command lines and sampler.

Kept apart from `diffusion.py` so that `--help` need not import the networks.
"""

from collections.abc import Sequence

import numpy as np

SCHEDULERS = ("ddim", "dpmsolver++", "unipc")
TIMESTEP_SPACINGS = ("leading", "trailing")

# What the confidence means is fixed by the timesteps of the paper's sampling: DDIM, 50 steps of 1000, leading, offset 1.
PAPER_TIMESTEPS = tuple(1000 // 50 * step + 1 for step in reversed(range(50)))  # 981, 961 ... 1
MIDPOINT = PAPER_TIMESTEPS[50 // 2]

READOUTS = {
    "midpoint": f"at timestep {MIDPOINT}, the middle of the paper's 50 steps",
    "mean": "mean over all of the paper's steps",
    "first": f"at timestep {PAPER_TIMESTEPS[0]}, the first of them, where there is nothing but the SAR to go by",
    "early": "mean over the first quarter of them, where the SAR alone speaks",
    "late": "mean over the last quarter of them, where little noise is left",
    "renoise": "after sampling, on the result noised anew; costs more U-Net passes",
    "decoded": "at the midpoint, carried to pixels by decoding perturbed latents; costs more VAE passes",
}
ENSEMBLE_OUTPUTS = ("first", "mean", "median")

RENOISE_TIMESTEPS = (500, 600, 750)  # lower ones know less of what the SAR alone shows, higher ones less of the error
RENOISE_DRAWS = 2  # U-Net passes: 3 timesteps x 2
DECODED_DRAWS = 4  # VAE decoder passes
READOUT_SEED = 2**40  # of the readouts' own noise, the same for all images of a size


def timesteps_read(readout: str) -> tuple[int, ...]:
    """The paper's timesteps whose σ² is averaged; none where σ² is read after sampling."""
    match readout:
        case "midpoint" | "decoded":
            return (MIDPOINT,)
        case "mean":
            return PAPER_TIMESTEPS
        case "first":
            return PAPER_TIMESTEPS[:1]
        case "early":
            return PAPER_TIMESTEPS[:13]
        case "late":
            return PAPER_TIMESTEPS[-13:]
        case "renoise":
            return ()
        case other:
            raise ValueError(f"unknown readout {other!r}, expected one of {', '.join(READOUTS)}")


def steps_read(readout: str, timesteps: Sequence[int]) -> dict[int, float]:
    """Falling timesteps of a sampling => {index of a step: weight of its σ²}, in the order of the steps; weights above 0.

    σ² at a timestep that the sampling leaves out is interpolated linearly between the two steps beside it, or taken from the
    nearest where there is but one. Linear, so that it can be summed up while sampling.
    """
    rising = timesteps[::-1]
    weights = [float(np.interp(timesteps_read(readout), rising, step[::-1]).sum()) for step in np.eye(len(timesteps))]
    return {index: weight for index, weight in enumerate(weights) if weight > 0}
