"""Train a small Stable-Diffusion-shaped base that a demo fine-tunes.

It stands to its images as SD 2.1 stands to pictures: an AutoencoderKL that reconstructs them and a 4-in/4-out U-Net
pretrained as a denoiser on EO images alone, without any SAR, beside a CLIP text encoder and tokenizer of the same
classes (random weights: one prompt is all they ever see). Folder layout, file names and configs are diffusers' own.

    python demo/pretrain_base.py sentinel      # assets/sentinel_base, from the training tiles of data/sentinel_demo
    python demo/pretrain_base.py simulated     # assets/simulated_base: about an hour on 2 CPU cores, VAE 16 min, U-Net 40 min

Simulated scenes are drawn from seeds that the demo's data never uses. The same command continues a U-Net that was interrupted.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cdiffset  # noqa: F401  first: it mends torchvision

# isort: split
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cdiffset.device import quickest_autocast
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import list_images, read_eo, read_sar
from cdiffset.model import embed_prompt, load_vae
from cdiffset.pipeline import encode
from data.simulate import Simulation, simulate_scene

ROOT = Path(__file__).resolve().parents[1]
SCENE_SEED = 5000  # the demo's own scenes come from small seeds
SCENES = 6000
CAPTION = "satellite photograph"
CROP_PX = 64  # what the VAE is trained on
KEPT, KEPT_EVERY = "unet.training", 500  # from where an interrupted U-Net goes on; iterations between two such states


@dataclass(frozen=True)
class Recipe:
    """How a base is made.

    A tile's colours are uniform over many pixels, and SD's schedule (beta_end 0.012) still shows them at its last timestep:
    a U-Net then reads the layout of a real tile from the noise and not from the SAR. `beta_end` 0.03 ends at a
    signal-to-noise ratio of 1e-5, where only v prediction gives the network something to learn.
    """

    latent_px: int  # side of the latent that the U-Net is trained on
    channels: tuple[int, ...]  # of the U-Net's blocks; one attention block each way, next to the innermost
    prediction_type: str
    beta_end: float
    vae_steps: int
    vae_batch: int
    unet_steps: int
    unet_batch: int
    unet_lr: float


RECIPES = {
    "simulated": Recipe(16, (64, 96, 128), "epsilon", 0.012, 3200, 16, 9000, 32, 5e-4),
    "sentinel": Recipe(16, (64, 96, 128), "v_prediction", 0.03, 9000, 8, 9000, 16, 8e-4),
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


def optimise(
    model: torch.nn.Module, loss_of_step: Callable, steps: int, lr: float, name: str, ema_decay: float, kept: Path | None = None
) -> None:
    """Run AdamW and leave the EMA of the weights in `model`; every few iterations the whole state goes to the file `kept`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
    parts, done = {"model": model, "optimizer": optimizer, "ema": ema}, 0
    if kept and kept.is_file():
        state = torch.load(kept, weights_only=True)
        done, settings = state.pop("done"), state.pop("settings")
        if settings != [steps, lr]:
            raise UserError(f"{kept} is of {settings[0]} steps at {settings[1]}, expected {steps} at {lr}: remove it")
        for part, values in state.items():
            parts[part].load_state_dict(values)
    started, recent = time.monotonic(), []
    for step in (bar := trange(done, steps, desc=name, unit="it", mininterval=10)):
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
        if kept and (step + 1) % KEPT_EVERY == 0:
            record = {"done": step + 1, "settings": [steps, lr]}
            torch.save(record | {part: held.state_dict() for part, held in parts.items()}, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
    ema.copy_to(model.parameters())
    minutes = (time.monotonic() - started) / 60
    print(f"{name}: {steps - done} iterations, mean loss of the last 100 {np.mean(recent):.5f}, {minutes:.1f} min")


def train_vae(images: dict[str, torch.Tensor], steps: int, batch: int) -> AutoencoderKL:
    """f = 4 with 4 latent channels, on EO and (every third batch) SAR images: MSE + 1e-4 KL per latent element."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[32, 64, 64],
        layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=64,
    )  # fmt: skip

    def loss_of_step(generator: torch.Generator) -> torch.Tensor:
        kind = "sar" if torch.randint(3, (), generator=generator) == 0 else "eo"
        pixels = draw_pixels(images[kind], batch, generator)
        with quickest_autocast("cpu"):
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


def make_scheduler(output: Path, recipe: Recipe) -> None:
    PNDMScheduler(
        beta_start=0.00085, beta_end=recipe.beta_end, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1, prediction_type=recipe.prediction_type,
    ).save_pretrained(output / "scheduler")  # fmt: skip


def encode_all(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] => latents [N, C, h, w], fp16."""
    chunks = tqdm(images.split(64), desc="encoding", mininterval=5)
    with torch.no_grad(), quickest_autocast("cpu"):
        return torch.cat([encode(vae, chunk.float() / 127.5 - 1) for chunk in chunks]).half()


def train_unet(vae: AutoencoderKL, output: Path, eo: torch.Tensor, recipe: Recipe) -> UNet2DConditionModel:
    """Denoising of EO latents, as SD was pretrained."""
    captions = [embed_prompt(str(output), CAPTION), embed_prompt(str(output), "")]
    scheduler = DDPMScheduler.from_pretrained(output / "scheduler")
    torch.manual_seed(1)
    channels = recipe.channels
    down = ["DownBlock2D"] * len(channels)
    up = ["UpBlock2D"] * len(channels)
    down[-2], up[1] = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = UNet2DConditionModel(
        sample_size=recipe.latent_px, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=1,
        norm_num_groups=16, down_block_types=down, up_block_types=up, cross_attention_dim=64, use_linear_projection=True,
        attention_head_dim=[width // 32 for width in channels],
    )  # fmt: skip
    # All 8 flips and turns: they are images of their own, as latents do not turn with the picture.
    views = [torch.rot90(side, turns, (2, 3)) for side in (eo, eo.flip(3)) for turns in range(4)]
    latents = torch.cat([encode_all(vae, view) for view in views])

    def loss_of_step(generator: torch.Generator) -> torch.Tensor:
        clean = latents[torch.randint(len(latents), (recipe.unet_batch,), generator=generator)].float()  # [B,4,h,w]
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        target = noise if recipe.prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, timesteps)
        caption = captions[int(torch.rand((), generator=generator) < 0.1)]
        with quickest_autocast("cpu"):
            noisy = scheduler.add_noise(clean, noise, timesteps)
            predicted = unet(noisy, timesteps, caption.expand(len(clean), -1, -1)).sample
        return F.mse_loss(predicted.float(), target)

    optimise(unet, loss_of_step, recipe.unet_steps, recipe.unet_lr, "U-Net", ema_decay=0.9995, kept=output / KEPT)
    return unet


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Pretrain a demo's small base.", allow_abbrev=False)
    parser.add_argument("kind", choices=RECIPES, help="what it is trained on")
    parser.add_argument("--output", type=Path, help="[assets/KIND_base]")
    args = parser.parse_args(argv)
    output, recipe = args.output or ROOT / "assets" / f"{args.kind}_base", RECIPES[args.kind]
    images = simulate(SCENES, seed=0) if args.kind == "simulated" else read_tiles(ROOT / "data/sentinel_demo/train")
    output.mkdir(parents=True, exist_ok=True)
    if not (output / KEPT).is_file():
        make_text_encoder(output)
        make_scheduler(output, recipe)
        train_vae(images, recipe.vae_steps, recipe.vae_batch).half().save_pretrained(output / "vae")
    # Read back, so that the U-Net learns the latents of the fp16 weights that the demo loads.
    unet = train_unet(load_vae(str(output)), output, images["eo"], recipe)
    unet.half().save_pretrained(output / "unet")
    (output / KEPT).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
