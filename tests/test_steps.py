"""The benchmark of fewer steps: its measures against hand computations, and a whole run on a few small images."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_translate import save_checkpoint
from tqdm import tqdm

from benchmarks import steps
from benchmarks.audit import load
from cdiffset.errors import UserError
from cdiffset.inference.options import PAPER, Sampling
from utils import PairMetrics

SCENES = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for index in range(SCENES):
        mask = np.zeros((2, 32, 32), np.uint8)
        mask[0, 4:8, 4:8] = mask[1, 20:23, 9:12] = 255
        pictures = {"sar": rng.integers(0, 256, (32, 32), np.uint8), "eo": rng.integers(0, 256, (32, 32, 3), np.uint8)}
        for kind, pixels in (pictures | {"sar_only": mask[0], "eo_only": mask[1]}).items():
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / kind / f"{index}.png")
    return root


def words(folders, checkpoint, **options) -> list[str]:
    given = ["--checkpoint", checkpoint, "--sar-dir", folders / "sar", "--eo-dir", folders / "eo", "--device", "cpu"]
    given += ["--mask-dirs", folders / "sar_only", folders / "eo_only"]
    for name, value in options.items():
        given += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
    return [str(word) for word in given]


def test_the_gradient_energy_of_a_ramp_and_of_a_checkerboard():
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    assert steps.gradient_energy((2 * rows + 3 * columns)[None, None]) == pytest.approx(4 + 9)
    assert steps.gradient_energy(((rows + columns) % 2)[None, None]) == pytest.approx(2)


def test_the_psnr_of_all_pixels_together():
    images, others = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    others[1] = 0.4  # 0.2 of the range in half of the pixels
    assert steps.psnr_between(images, others) == pytest.approx(-10 * np.log10(0.04 / 2))
    assert steps.psnr_between(images, images) == np.inf


def test_the_papers_sampling_is_as_itself_and_others_are_not(folders, tiny_base, tmp_path):
    model = load(str(save_checkpoint(tmp_path, tiny_base, 5)), "cpu")
    args = steps.make_parser().parse_args(words(folders, "none", images=2))
    pairs = steps.read_pairs(args, "cpu")
    assert pairs.sar.shape == (2, 3, 32, 32) and pairs.sar_only.sum() == 2 * 16
    assert (~pairs.clean).sum() == 2 * (16 + 9)
    with tqdm(disable=True) as bar:
        paper, few = (steps.sampled(model, each, pairs.sar, 1, 0, bar) for each in (PAPER, Sampling("unipc", "trailing", 2)))
    same, other = (steps.measures(result, paper, pairs, PairMetrics(with_lpips=False)) for result in (paper, few))
    assert (same["to_paper"], same["map_to_paper"], same["level"]) == (np.inf, pytest.approx(1), pytest.approx(1))
    assert np.isfinite(other["to_paper"]) and other["map_to_paper"] < 1
    gain = few.sigma2.double().log().mean().exp() / paper.sigma2.double().log().mean().exp()
    assert other["level"] == pytest.approx(gain.item())
    assert other["seconds"] > 0 and "lpips" not in other


def test_a_run_writes_its_tables_and_figure(folders, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "PAPER", few := Sampling("ddim", "leading", 2))
    monkeypatch.setattr(steps, "PRESETS", {"paper": (few, "")})
    checkpoint = save_checkpoint(tmp_path, tiny_base, 5)
    assert steps.main(words(folders, checkpoint, steps=(1, 2), batch_size=2, output=tmp_path / "out")) == 0
    text = (tmp_path / "out/STEPS.md").read_text()
    assert f"first {SCENES} images" in text and "LPIPS is missing: switched off" in text
    assert text.count("\n### ") == 6 and text.count("\n| 1 | ") == text.count("\n| 2 | ") == 6
    assert "`paper`: ddim leading 2" in text and "paper, other noise" in text
    assert Image.open(tmp_path / "out/steps.png").width > 800


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (0, 2)}, "--steps of 1 to 50"),
        ({"images": 0}, "--images of at least 1"),
        ({"sar_dir": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_bad_options_are_refused(folders, changes, message):
    with pytest.raises(UserError, match=message):
        steps.main(words(folders, "none", **changes))


def test_a_stage_1_checkpoint_is_refused(folders, tiny_base, tmp_path):
    with pytest.raises(UserError, match="is of stage 1, expected one of stage 2"):
        steps.main(words(folders, save_checkpoint(tmp_path, tiny_base, 4)))
