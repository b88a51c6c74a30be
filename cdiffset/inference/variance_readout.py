"""When in sampling σ² is read: the names on the command line, and the timesteps that they stand for.

benchmarks/DISCREPANCY.md says what each is good for.
"""

from cdiffset.config import MIDPOINT, PAPER_TIMESTEPS

VARIANCE_READOUTS = {  # name: (timesteps over which the mean is taken, what it is good for)
    "midpoint": ((MIDPOINT,), f"at timestep {MIDPOINT}, the middle of the paper's 50 steps; follows the error best"),
    "first": (PAPER_TIMESTEPS[:1], f"at timestep {PAPER_TIMESTEPS[0]}, from the SAR alone; marks best what may have moved"),
    "early": (PAPER_TIMESTEPS[:13], "mean over the first quarter of the paper's steps; between the two"),
}
