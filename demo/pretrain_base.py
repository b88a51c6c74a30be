"""Train a small Stable-Diffusion-shaped base that a demo fine-tunes, 5.6 M parameters in fp16.

It stands to its images as SD 2.1 stands to pictures: an AutoencoderKL that reconstructs them and a 4-in/4-out U-Net
pretrained as a noise predictor on EO images alone, without any SAR, beside a CLIP text encoder and tokenizer of the same
classes (random weights: one prompt is all they ever see). Folder layout, file names and configs are diffusers' own.

    python demo/pretrain_base.py simulated     # assets/demo_base: about an hour on 2 CPU cores, VAE 16 min, U-Net 40 min
    python demo/pretrain_base.py sentinel      # assets/sentinel_base, from the training tiles of data/sentinel_demo

Simulated scenes are drawn from seeds that the demo's data never uses.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cdiffset  # noqa: F401  first: it mends torchvision

# isort: split
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cdiffset.errors import Parser, run
from cdiffset.images import list_images, read_eo, read_sar
from cdiffset.model import embed_prompt, encode, load_vae
from data.simulate import Simulation, simulate_scene

ROOT = Path(__file__).resolve().parents[1]
SCENE_SEED = 5000  # the demo's own scenes come from small seeds
SCENES = 6000
CAPTION = "satellite photograph"
CROP_PX = 64  # what the VAE is trained on
UNETS = {  # side of the latent, channels of the blocks; one attention block each way, next to the innermost
    "simulated": (16, (64, 96, 128)),
    "sentinel": (32, (32, 64, 96, 128)),
}


def simulate(count: int, seed: int) -> dict[str, torch.Tensor]:
    """{"eo", "sar"}: uint8 [count, 3, 64, 64]."""
    images = {"eo": [], "sar": []}
    for index in trange(count, desc="simulating", unit="scene", mininterval=5):
        scene = simulate_scene(np.random.default_rng([SCENE_SEED + seed, index]), Simulation())
        images["eo"].append(scene["eo"].transpose(2, 0, 1))
        images["sar"].append(np.repeat(scene["sar"][None], 3, 0))
    return {name: torch.from_numpy(np.stack(stack)) for name, stack in images.items()}


def read_tiles(folder: Path) -> dict[str, torch.Tensor]:
    """{"eo", "sar"}: uint8 [count, 3, H, W]."""
    read = {"eo": read_eo, "sar": read_sar}
    stacks = {kind: np.stack([read[kind](folder / kind / name) for name in list_images(folder / kind)]) for kind in read}
    return {kind: torch.from_numpy(stack.astype(np.uint8)).permute(0, 3, 1, 2).contiguous() for kind, stack in stacks.items()}


def draw_pixels(images: torch.Tensor, batch: int, generator: torch.Generator) -> torch.Tensor:
    """A random batch of crops in [-1, 1], the whole of it cut, flipped and turned alike, at random."""
    pixels = images[torch.randint(len(images), (batch,), generator=generator)]
    if (side := images.shape[-1]) > CROP_PX:
        top, left = torch.randint(side - CROP_PX + 1, (2,), generator=generator).tolist()
        pixels = pixels[..., top : top + CROP_PX, left : left + CROP_PX]
    pixels = pixels.float() / 127.5 - 1
    turns, flip = torch.randint(4, (), generator=generator).item(), torch.randint(2, (), generator=generator).item()
    pixels = torch.rot90(pixels, turns, (2, 3))
    return pixels.flip(3) if flip else pixels


def cosine_lr(peak: float, step: int, steps: int, warmup: int = 100) -> float:
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimise(model, loss_of_step, steps: int, lr: float, name: str, ema_decay: float) -> None:
    """Run AdamW under bf16 autocast and leave the EMA of the weights in `model`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
    started, recent = time.monotonic(), []
    for step in (bar := trange(steps, desc=name, unit="it", mininterval=10)):
        optimizer.param_groups[0]["lr"] = cosine_lr(lr, step, steps)
        loss = loss_of_step(torch.Generator().manual_seed(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 99:
            bar.set_postfix(loss=f"{np.mean(recent):.5f}", refresh=False)
    ema.copy_to(model.parameters())
    minutes = (time.monotonic() - started) / 60
    print(f"{name}: {steps} iterations, mean loss of the last 100 {np.mean(recent):.5f}, {minutes:.1f} min")


def train_vae(images: dict[str, torch.Tensor], steps: int) -> AutoencoderKL:
    """f = 4 with 4 latent channels, on EO and (every third batch) SAR images: MSE + 1e-4 KL per latent element."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[32, 64, 64],
        layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=64,
    )  # fmt: skip

    def loss_of_step(generator: torch.Generator) -> torch.Tensor:
        kind = "sar" if torch.randint(3, (), generator=generator) == 0 else "eo"
        pixels = draw_pixels(images[kind], 16, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample(generator)).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return F.mse_loss(restored.float(), pixels) + 1e-4 * kl

    optimise(vae, loss_of_step, steps, lr=1e-3, name="VAE", ema_decay=0.999)
    with torch.no_grad():
        pixels = images["eo"][:1024].float() / 127.5 - 1
        std = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(64)]).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    return vae


def make_text_encoder(output: Path) -> None:
    """A CLIP tokenizer that spells words letter by letter and a two-layer CLIP text model."""
    alphabet = sorted({chr(code) for code in range(ord("!"), ord("~") + 1)})
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        CLIPTokenizer(str(vocab), str(merges), model_max_length=77).save_pretrained(output / "tokenizer")
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=64, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
    )  # fmt: skip
    CLIPTextModel(config).half().save_pretrained(output / "text_encoder")


def make_scheduler(output: Path) -> None:
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False,
        steps_offset=1, prediction_type="epsilon",
    ).save_pretrained(output / "scheduler")  # fmt: skip


def train_unet(vae: AutoencoderKL, output: Path, eo: torch.Tensor, kind: str, steps: int) -> UNet2DConditionModel:
    """Noise prediction on EO latents, as SD was pretrained."""
    captions = [embed_prompt(str(output), CAPTION), embed_prompt(str(output), "")]
    scheduler = PNDMScheduler.from_pretrained(output / "scheduler")
    alphas_cumprod = scheduler.alphas_cumprod
    torch.manual_seed(1)
    side, channels = UNETS[kind]
    down = ["DownBlock2D"] * len(channels)
    up = ["UpBlock2D"] * len(channels)
    down[-2], up[1] = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=1, norm_num_groups=16,
        down_block_types=down, up_block_types=up, attention_head_dim=[width // 32 for width in channels],
        cross_attention_dim=64, use_linear_projection=True,
    )  # fmt: skip
    views = []  # the 8 flips and turns are images of their own: latents do not turn with the picture
    for flip in (False, True):
        for turns in range(4):
            pixels = torch.rot90(eo.flip(3) if flip else eo, turns, (2, 3))
            chunks = tqdm(pixels.split(64), desc=f"encoding view {len(views) + 1} of 8", mininterval=5)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                views.append(torch.cat([encode(vae, chunk.float() / 127.5 - 1) for chunk in chunks]))
    latents = torch.cat(views).half()  # [8 x images,4,h,w]

    def loss_of_step(generator: torch.Generator) -> torch.Tensor:
        clean = latents[torch.randint(len(latents), (32,), generator=generator)].float()  # [B,4,h,w]
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (32,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas_cumprod[timesteps][:, None, None, None]
        caption = captions[int(torch.rand((), generator=generator) < 0.1)]
        with torch.autocast("cpu", torch.bfloat16):
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            predicted = unet(noisy, timesteps, caption.expand(32, -1, -1)).sample
        return F.mse_loss(predicted.float(), noise)

    optimise(unet, loss_of_step, steps, lr=5e-4, name="U-Net", ema_decay=0.9995)
    return unet


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Pretrain a demo's small base.", allow_abbrev=False)
    parser.add_argument("kind", choices=UNETS, help="what it is trained on")
    parser.add_argument("--output", type=Path, help="[assets/demo_base, or assets/sentinel_base]")
    parser.add_argument("--vae-steps", type=int, default=3200, help="iterations of 16 images [%(default)s]")
    parser.add_argument("--unet-steps", type=int, default=9000, help="iterations of 32 images [%(default)s]")
    args = parser.parse_args(argv)
    output = args.output or ROOT / "assets" / ("demo_base" if args.kind == "simulated" else "sentinel_base")
    images = simulate(SCENES, seed=0) if args.kind == "simulated" else read_tiles(ROOT / "data/sentinel_demo/train")
    output.mkdir(parents=True, exist_ok=True)
    make_text_encoder(output)
    make_scheduler(output)
    train_vae(images, args.vae_steps).half().save_pretrained(output / "vae")
    # Read back, so that the U-Net learns the latents of the fp16 weights that the demo loads.
    unet = train_unet(load_vae(str(output)), output, images["eo"], args.kind, args.unet_steps)
    unet.half().save_pretrained(output / "unet")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
