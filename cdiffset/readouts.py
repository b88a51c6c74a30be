"""Where and when σ² is read, and what becomes of several samples: the names and constants, for command lines and sampler.

Kept apart from `diffusion.py` so that `--help` need not import the networks.
"""

READOUTS = {
    "midpoint": "at the middle step of sampling, as in the paper",
    "mean": "mean over all steps",
    "first": "at the first step, where there is nothing but the SAR to go by",
    "early": "mean over the first quarter of the steps, where the SAR alone speaks",
    "late": "mean over the last quarter of the steps, where little noise is left",
    "renoise": "after sampling, on the result noised anew; costs more U-Net passes",
    "decoded": "at the middle step, carried to pixels by decoding perturbed latents; costs more VAE passes",
}
ENSEMBLE_OUTPUTS = ("first", "mean", "median")

RENOISE_TIMESTEPS = (500, 600, 750)  # lower ones know less of what the SAR alone shows, higher ones less of the error
RENOISE_DRAWS = 2  # U-Net passes: 3 timesteps x 2
DECODED_DRAWS = 4  # VAE decoder passes
READOUT_SEED = 2**40  # far from the seeds that people give, whose noise the results contain


def steps_read(readout: str, num_inference_steps: int) -> range:
    """Indices of the sampling steps whose σ² is averaged; none where σ² is read after sampling."""
    n = num_inference_steps
    match readout:
        case "midpoint" | "decoded":
            return range(n // 2, n // 2 + 1)
        case "mean":
            return range(n)
        case "first":
            return range(1)
        case "early":
            return range((n + 3) // 4)
        case "late":
            return range(n - (n + 3) // 4, n)
        case "renoise":
            return range(0)
        case other:
            raise ValueError(f"unknown readout {other!r}, expected one of {', '.join(READOUTS)}")
