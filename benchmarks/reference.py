"""The yardstick of the speed benchmarks: the paper's recipe, written straightforwardly with diffusers.

Everything in float32, both images of a pair encoded in every iteration, translation one image after the other, one thing at a
time, each component loaded by from_pretrained, nothing compiled. It shares no code with `cdiffset/` (imported for torchvision's
sake alone), so that it is also an independent check of the loss and of the sampler.

    python benchmarks/reference.py --base BASE --checkpoint UNET_FOLDER --sar-dir SAR --output-dir EO     # translates a folder
"""

import argparse
import hashlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import cdiffset  # noqa: F401  first: it mends torchvision

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

PROMPT = "electro-optical image"
LEARNING_RATE, WEIGHT_DECAY, WARMUP, ITERATIONS = 3e-5, 0.01, 100, 50_000  # the paper's


def load_models(base: str, device: str, checkpoint: str | None = None) -> SimpleNamespace:
    """VAE, scheduler, prompt embedding [1, L, D], and the U-Net: the base's, patched for stage 2, or a checkpoint's folder."""
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32).to(device)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").to(device).requires_grad_(False)
    if checkpoint is None:
        unet = patch(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
    else:
        unet = UNet2DConditionModel.from_pretrained(checkpoint)
    scheduler = DDIMScheduler.from_pretrained(
        base, subfolder="scheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    with torch.no_grad():
        tokens = tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
        prompt = text_encoder(tokens)[0]
    return SimpleNamespace(vae=vae, unet=unet.to(device), scheduler=scheduler, prompt=prompt, device=device)


def patch(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """8 channels in (the kernel twice, halved), 5 out (the raw variance starts at 0)."""
    conv_in, conv_out = unet.conv_in, unet.conv_out
    unet.conv_in = nn.Conv2d(8, conv_in.out_channels, 3, padding=1)
    unet.conv_out = nn.Conv2d(conv_out.in_channels, 5, 3, padding=1)
    with torch.no_grad():
        unet.conv_in.weight.copy_(torch.cat([conv_in.weight, conv_in.weight], dim=1) / 2)
        unet.conv_in.bias.copy_(conv_in.bias)
        unet.conv_out.weight.zero_()[:4] = conv_out.weight
        unet.conv_out.bias.zero_()[:4] = conv_out.bias
    unet.register_to_config(in_channels=8, out_channels=5)
    return unet


def read_image(path: Path) -> torch.Tensor:
    """An 8-bit image file => [3, H, W] in [-1, 1]."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def write_image(path: Path, image: torch.Tensor) -> None:
    """[3, H, W] in [-1, 1] => an 8-bit PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)


def encode(models: SimpleNamespace, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return models.vae.encode(pixels.to(models.device)).latent_dist.mean * models.vae.config.scaling_factor


# -------------------------------------------------------------------------------------------------------------- training
class Pairs(Dataset):
    """Files of equal names in two folders, flipped and turned at random."""

    def __init__(self, sar_dir: Path, eo_dir: Path):
        self.files = [(path, eo_dir / path.name) for path in sorted(sar_dir.glob("*.png"))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = torch.stack([read_image(path) for path in self.files[index]])  # [2,3,H,W]
        for dims in ((3,), (2,)):
            if torch.rand(()) < 0.5:
                pair = pair.flip(dims)
        if torch.rand(()) < 0.5:
            pair = pair.rot90(1, (2, 3))
        return pair[0], pair[1]


def make_loader(sar_dir: Path, eo_dir: Path, batch_size: int, iterations: int, num_workers: int) -> DataLoader:
    pairs = Pairs(sar_dir, eo_dir)
    order = RandomSampler(pairs, num_samples=batch_size * iterations)
    return DataLoader(pairs, batch_size, sampler=order, num_workers=num_workers)


def training_loss(
    models: SimpleNamespace, z_sar: torch.Tensor, z_eo: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """C-Diff loss of latents [B, 4, h, w] at timesteps [B] => scalar. β = sqrt(ᾱ_t); sg[σ²]^β weighs the Gaussian NLL."""
    alpha_bar = models.scheduler.alphas_cumprod.to(z_eo.device)[timesteps].view(-1, 1, 1, 1)
    z_t = alpha_bar.sqrt() * z_eo + (1 - alpha_bar).sqrt() * noise
    output = models.unet(torch.cat([z_sar, z_t], 1), timesteps, models.prompt.repeat(len(z_t), 1, 1)).sample
    sigma2 = sigma2_of(output)
    nll = F.gaussian_nll_loss(output[:, :4], noise, sigma2.expand(-1, 4, -1, -1), full=True, reduction="none")
    return (sigma2.detach().pow(alpha_bar.sqrt()) * nll).mean()


def sigma2_of(output: torch.Tensor) -> torch.Tensor:
    """The fifth channel v => σ² = clamp(softplus(v + c) + 1e-6, 1e-6, 10), and σ² = 1 at v = 0."""
    offset = math.log(math.expm1(1 - 1e-6))
    return (F.softplus(output[:, 4:] + offset) + 1e-6).clamp(1e-6, 10)


def train(models: SimpleNamespace, batches):
    """The training loop, an iteration for each batch (SAR, EO) [B, 3, H, W]; yields the losses."""
    unet = models.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=ITERATIONS)
    for sar, eo in batches:
        z_sar, z_eo = encode(models, sar), encode(models, eo)
        noise = torch.randn_like(z_eo)
        timesteps = torch.randint(0, models.scheduler.config.num_train_timesteps, (len(z_eo),), device=z_eo.device)
        loss = training_loss(models, z_sar, z_eo, noise, timesteps)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


# ----------------------------------------------------------------------------------------------------------- translation
def noise_seed(sar: torch.Tensor, seed: int) -> int:
    """Of an 8-bit SAR image [1, 3, H, W] in [-1, 1]: every image starts from noise of its own, as in test.py."""
    pixels = ((sar[0] + 1) * 127.5).round().permute(1, 2, 0).cpu().numpy().astype("<f4")
    digest = hashlib.sha256(f"{seed}\0".encode() + pixels.tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def translate(models: SimpleNamespace, sar: torch.Tensor, steps: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """SAR [1, 3, H, W] => (EO [1, 3, H, W], σ² [1, 1, h, w] at the midpoint), by DDIM, η = 0."""
    z_sar = encode(models, sar)
    z_t = torch.randn(z_sar.shape, generator=torch.Generator().manual_seed(noise_seed(sar, seed))).to(models.device)
    models.scheduler.set_timesteps(steps)
    for index, timestep in enumerate(models.scheduler.timesteps):
        output = models.unet(torch.cat([z_sar, z_t], 1), timestep, models.prompt).sample
        if index == steps // 2:
            sigma2 = sigma2_of(output)
        z_t = models.scheduler.step(output[:, :4], timestep, z_t).prev_sample
    return models.vae.decode(z_t / models.vae.config.scaling_factor).sample, sigma2


def translate_folder(models: SimpleNamespace, sar_dir: Path, output_dir: Path, steps: int) -> None:
    """Read, translate, write, one file after the other."""
    models.unet.eval()
    for path in tqdm(sorted(sar_dir.glob("*.png")), unit="image", mininterval=1):
        eo, _ = translate(models, read_image(path)[None], steps)
        write_image(output_dir / path.name, eo[0])


def main() -> int:
    parser = argparse.ArgumentParser(description="Translate a folder of PNG files by the plain reference loop.")
    parser.add_argument("--base", required=True, help="base model, a folder in diffusers layout")
    parser.add_argument("--checkpoint", required=True, help="stage 2 U-Net, a folder in diffusers layout")
    parser.add_argument("--sar-dir", type=Path, required=True, help="PNG files whose sides are multiples of 8")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-inference-steps", type=int, default=50, help="DDIM steps [50]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    models = load_models(args.base, args.device, args.checkpoint)
    translate_folder(models, args.sar_dir, args.output_dir, args.num_inference_steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
