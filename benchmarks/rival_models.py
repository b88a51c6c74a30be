"""What people would use instead of C-DiffSET, in short implementations: one run of one method on the demo's real pairs.

    python benchmarks/rival_models.py --method pix2pix --updates 1000 --output work_dir/pix2pix

- `regression`: pix2pix's generator with fewer channels, so that it is as large as C-DiffSET's small U-Net, trained by the mean
  absolute error alone.
- `pix2pix` (Isola et al., CVPR 2017): U-Net generator of 64 channels and 6 levels, down to one pixel, a 70 x 70 PatchGAN (a
  patch of it sees a whole tile),
  cross-entropy + 100 L1, weights from N(0, 0.02), Adam 2e-4 with β1 = 0.5, constant for the first half and falling linearly to
  0 in the second. Not as published: batches of 16, and neither dropout nor statistics of the batch in translation.
- `pixel_diffusion`: SR3 (Saharia et al., TPAMI 2022), noise and SAR side by side into a U-Net; here on 4 x 4 patches instead of
  single pixels, and the network predicts the clean image and is trained by the error of v (Li and He, arXiv 2511.13720). The
  U-Net is as large as C-DiffSET's, and starts from nothing.

Batches of 16, memory settings and precision (bfloat16 where the CPU has it): all methods alike. Writes PART/OUTPUT/eo/*.png for
the parts `test` and `unseen`, and record.json.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import REPO, write_json

# isort: split
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm import trange

from cdiffset.checkpoint import size_and_hash
from cdiffset.config import DEFAULT_PROMPT
from cdiffset.device import keep_freed_memory, quickest_autocast
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import list_images, write_png
from cdiffset.model import embed_prompt, load_scheduler
from cdiffset.pipeline import image_seed, make_sampler, sample, starting_noise, to_uint8
from demo.pretrain_base import read_tiles

PAIRS = REPO / "data/sentinel_demo"
BASE = REPO / "assets/sentinel_base"
PARTS = ("test", "unseen")
BATCH = 16
LEVELS = 6  # of a generator that takes 64 px down to one
PATCH_PX = 4  # of the pixel diffusion
MEAN_OF = 8  # samples
Tiles = dict[str, torch.Tensor]  # of read_tiles
SAMPLINGS = {"sample": ("leading", 50, 1), "mean": ("trailing", 8, MEAN_OF)}  # DDIM: spacing, steps, samples per image


def base_hashes() -> dict[str, str]:
    """What tells one base from another, for the settings of a run that may be continued."""
    return {name: size_and_hash(BASE / name / "diffusion_pytorch_model.safetensors")["sha256"] for name in ("vae", "unet")}


# ------------------------------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """pix2pix's U-Net: [B, 1, 64, 64] => [B, 3, 64, 64], both in [-1, 1]."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        widths = [width * min(2**level, 8) for level in range(LEVELS)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(widths):
            layers = [nn.Conv2d(widths[level - 1] if level else 1, channels, 4, 2, 1)]
            if 0 < level < LEVELS - 1:  # neither the first nor, of one pixel, the last is normalised
                layers.append(nn.BatchNorm2d(channels))
            self.down.append(nn.Sequential(*([nn.LeakyReLU(0.2)] if level else []), *layers))
        for level in reversed(range(LEVELS)):
            given = widths[level] * (1 if level == LEVELS - 1 else 2)  # its own and the skipped
            layers = [nn.ReLU(), nn.ConvTranspose2d(given, widths[level - 1] if level else 3, 4, 2, 1)]
            if level:
                layers.append(nn.BatchNorm2d(widths[level - 1]))
            if LEVELS - 4 <= level < LEVELS - 1:
                layers.append(nn.Dropout(dropout))
            self.up.append(nn.Sequential(*layers))

    def forward(self, sar: torch.Tensor) -> torch.Tensor:
        skipped, features = [], sar
        for down in self.down:
            features = down(features)
            skipped.append(features)
        for index, up in enumerate(self.up):
            features = up(features if index == 0 else torch.cat([features, skipped[-1 - index]], 1))
        return features.tanh()


def discriminator() -> nn.Sequential:
    """The 70 x 70 PatchGAN: SAR and EO [B, 4, H, W] => a logit for each patch."""
    layers, before = [], 4
    for level, channels in enumerate((64, 128, 256, 512)):
        layers.append(nn.Conv2d(before, channels, 4, 2 if level < 3 else 1, 1))
        layers += ([nn.BatchNorm2d(channels)] if level else []) + [nn.LeakyReLU(0.2)]
        before = channels
    return nn.Sequential(*layers, nn.Conv2d(before, 1, 4, 1, 1))


def pixel_unet() -> UNet2DConditionModel:
    """The small base's U-Net with random weights: patches of noisy EO and SAR in, patches of clean EO out."""
    config = UNet2DConditionModel.load_config(BASE / "unet")
    config |= {"in_channels": (3 + 1) * PATCH_PX**2, "out_channels": 3 * PATCH_PX**2}
    return UNet2DConditionModel.from_config(config)


# ------------------------------------------------------------------------------------------------------------- training
def batches(tiles: Tiles, updates: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Training batches, SAR [B, 1, H, W] and EO [B, 3, H, W] in [-1, 1]; neither flipped nor turned, as in the demo."""
    images = torch.cat([tiles["sar"][:, :1], tiles["eo"]], 1)  # uint8 [N,4,H,W]
    generator = torch.Generator().manual_seed(seed)
    for _ in trange(updates, desc="training", unit="it", mininterval=10):
        picked = images[torch.randint(len(images), (BATCH,), generator=generator)].float() / 127.5 - 1
        yield picked[:, :1], picked[:, 1:]


def prepared(network: nn.Module) -> nn.Module:
    """In the memory layout that this program trains in."""
    return network.to(memory_format=torch.channels_last)


def late_decay(updates: int) -> Callable[[int], float]:
    """pix2pix's schedule: 1 for the first half, then linear to 0."""
    return lambda update: min(1.0, 2 * (1 - update / updates))


def train_regression(tiles: Tiles, updates: int, seed: int) -> nn.Module:
    generator = prepared(Generator(width=25, dropout=0.0))
    optimizer = torch.optim.AdamW(generator.parameters(), 1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, late_decay(updates))
    for sar, eo in batches(tiles, updates, seed):
        with quickest_autocast("cpu"):
            generated = generator(sar)
        F.l1_loss(generated.float(), eo).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return generator.eval()


def train_pix2pix(tiles: Tiles, updates: int, seed: int) -> nn.Module:
    generator, critic = prepared(Generator(width=64, dropout=0.5)), prepared(discriminator())
    for layer in [*generator.modules(), *critic.modules()]:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=0.02)
    optimizers = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999), fused=True) for net in (generator, critic)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, late_decay(updates)) for optimizer in optimizers]

    def adversarial(sar: torch.Tensor, eo: torch.Tensor, is_real: bool) -> torch.Tensor:
        with quickest_autocast("cpu"):
            logits = critic(torch.cat([sar, eo], 1))
        return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, float(is_real), dtype=torch.float32))

    for sar, eo in batches(tiles, updates, seed):
        with quickest_autocast("cpu"):
            generated = generator(sar)
        critic_loss = 0.5 * (adversarial(sar, eo, True) + adversarial(sar, generated.detach(), False))
        critic_loss.backward()
        optimizers[1].step()
        critic.requires_grad_(False)
        (adversarial(sar, generated, True) + 100 * F.l1_loss(generated.float(), eo)).backward()
        critic.requires_grad_(True)
        optimizers[0].step()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.zero_grad()
            schedule.step()
    return generator.eval()


def v_weight(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The squared error of v over that of the clean image, whose noise follows from it; bounded, as in Li and He."""
    return 1 / (1 - alphas_cumprod).clamp(min=0.05)


def train_pixel_diffusion(tiles: Tiles, updates: int, seed: int) -> nn.Module:
    unet, prompt = prepared(pixel_unet()), embed_prompt(str(BASE), DEFAULT_PROMPT).expand(BATCH, -1, -1)
    average, scheduler = copy.deepcopy(unet).requires_grad_(False), load_scheduler(str(BASE), "sample")
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, late_decay(updates))
    generator = torch.Generator().manual_seed(seed + 1)
    for update, (sar, eo) in enumerate(batches(tiles, updates, seed)):
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(eo.shape, generator=generator)
        noised = scheduler.add_noise(eo, noise, timesteps)
        noisy = torch.cat([F.pixel_unshuffle(sar, PATCH_PX), F.pixel_unshuffle(noised, PATCH_PX)], 1)
        with quickest_autocast("cpu"):
            predicted = unet(noisy, timesteps, prompt).sample
        squared = (predicted.float() - F.pixel_unshuffle(eo, PATCH_PX)) ** 2
        (v_weight(scheduler.alphas_cumprod[timesteps])[:, None, None, None] * squared).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(0.998, (1 + update) / (10 + update))
        torch._foreach_lerp_(list(average.parameters()), [weight.detach() for weight in unet.parameters()], 1 - decay)
    return average.eval()


# ---------------------------------------------------------------------------------------------------------- translation
@torch.no_grad()
def generate(generator: nn.Module, sar: torch.Tensor) -> torch.Tensor:
    with quickest_autocast("cpu"):
        return generator(sar).float()


@torch.no_grad()
def diffuse(unet: nn.Module, sar: torch.Tensor, spacing: str, steps: int, samples: int) -> torch.Tensor:
    """The project's own sampler over patches instead of latents; noise by the image's content, as there."""
    scheduler = make_sampler(load_scheduler(str(BASE), "sample"), timestep_spacing=spacing)
    prompt = embed_prompt(str(BASE), DEFAULT_PROMPT)
    patches, total = F.pixel_unshuffle(sar, PATCH_PX), torch.zeros(len(sar), 3, *sar.shape[2:])
    shape = (3 * PATCH_PX**2, *patches.shape[2:])
    for number in range(samples):
        noise = torch.cat([starting_noise(image_seed(number, each.numpy()), shape) for each in sar])
        with quickest_autocast("cpu"):
            total += F.pixel_shuffle(sample(unet, scheduler, patches, noise, prompt, steps)[0], PATCH_PX).clamp(-1, 1)
    return total / samples


def translations(method: str, model: nn.Module) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """{output: SAR [B, 1, H, W] => EO [B, 3, H, W]}; diffusion gives one sample and the mean of several."""
    if method != "pixel_diffusion":
        return {"sample": lambda sar: generate(model, sar)}
    return {name: lambda sar, how=how: diffuse(model, sar, *how) for name, how in SAMPLINGS.items()}


def write_translations(method: str, model: nn.Module, output: Path) -> float:
    """Translate all parts => seconds per image of the first output."""
    seconds, count = 0.0, 0
    for part in PARTS:
        names, sar = list_images(PAIRS / part / "sar"), read_tiles(PAIRS / part)["sar"][:, :1].float() / 127.5 - 1
        for name, translate in translations(method, model).items():
            started = time.monotonic()
            eo = np.concatenate([to_uint8(translate(chunk)) for chunk in sar.split(32)])
            if name == "sample":
                seconds, count = seconds + time.monotonic() - started, count + len(sar)
            for file, pixels in zip(names, eo, strict=True):
                write_png(output / part / name / "eo" / file.with_suffix(".png"), pixels)
    return seconds / count


METHODS = {"regression": train_regression, "pix2pix": train_pix2pix, "pixel_diffusion": train_pixel_diffusion}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Train and translate one method on the demo's pairs.", allow_abbrev=False)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--updates", type=int, required=True, help=f"of {BATCH} images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures and of record.json")
    parser.add_argument("--train-only", action="store_true", help="time the training, write record.json alone")
    args = parser.parse_args(argv)
    if args.updates < 1:
        raise UserError(f"--updates: expected at least 1, found {args.updates}")
    torch.manual_seed(args.seed)
    keep_freed_memory(torch.device("cpu"))
    tiles, started = read_tiles(PAIRS / "train"), time.monotonic()
    model = METHODS[args.method](tiles, args.updates, args.seed)
    record = {"updates": args.updates, "training_s": time.monotonic() - started}
    record["parameters"] = sum(weight.numel() for weight in model.parameters())
    if not args.train_only:
        record["s_per_image"] = write_translations(args.method, model, args.output)
    write_json(args.output / "record.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
