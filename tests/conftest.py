"""Small real components and images that the tests make themselves. No test touches the network."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several processes share few cores: threads that wait must not spin

# isort: off
import cdiffset  # noqa: F401  first: it mends torchvision, which diffusers imports

# isort: on
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from training import command_line, forget_accelerator

import main
from demo.pretrain_base import RECIPES, make_scheduler, make_text_encoder

REPO = Path(__file__).resolve().parents[1]


def tiny_unet(**changes) -> UNet2DConditionModel:
    """A Stable-Diffusion-shaped U-Net, 4 in and 4 out, of some 10^5 parameters."""
    torch.manual_seed(1)
    config = dict(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=[2, 2], cross_attention_dim=64, use_linear_projection=True,
    )  # fmt: skip
    return UNet2DConditionModel(**{**config, **changes}).eval()


def tiny_vae() -> AutoencoderKL:
    """An f = 4 VAE with 4 latent channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[8, 8, 8],
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32, scaling_factor=0.7,
    ).eval()  # fmt: skip


@pytest.fixture
def samples() -> Path:
    """Real pairs in the datasets' layouts, QXSLAB_SAROPT/ and sar2opt/, where someone has put them."""
    folder = Path(os.environ.get("CDIFFSET_SAMPLES", REPO.parent / "shared/samples"))
    if not folder.is_dir():
        pytest.skip(f"no real samples in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """A complete base model folder in diffusers layout with random weights."""
    folder = tmp_path_factory.mktemp("base")
    make_scheduler(folder, RECIPES["simulated"])
    make_text_encoder(folder)
    tiny_vae().save_pretrained(folder / "vae")
    tiny_unet().save_pretrained(folder / "unet")
    return str(folder)


@pytest.fixture(scope="session")
def pair_folders(tmp_path_factory) -> Path:
    """train/ and test/, each with sar/ and eo/: 12 and 5 pairs of smooth 40 x 40 px images."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for index in range(count):
            coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            for kind, pixels in (("eo", coarse), ("sar", coarse[..., 0])):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).resize((40, 40)).save(root / split / kind / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def argv(tiny_base, pair_folders):
    """main.py's command line, see `command_line`."""
    return lambda work_dir, **changes: command_line(work_dir, tiny_base, pair_folders, **changes)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture(scope="session")
def run(argv):
    """Train in process => the work_dir."""

    def make(work_dir, **changes) -> Path:
        forget_accelerator()
        assert main.main(argv(work_dir, **changes)) == 0
        return Path(work_dir)

    return make
