"""The diffusion step against closed forms, the sampler against a plain diffusers loop and an oracle."""

import argparse
import hashlib
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_unet, tiny_vae
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from cdiffset.config import MIDPOINT, PAPER_TIMESTEPS
from cdiffset.errors import UserError
from cdiffset.inference.options import (
    PRESETS,
    SCHEDULERS,
    TIMESTEP_SPACINGS,
    SamplingSettings,
    add_translation_options,
    calibrated_settings,
    sampling_settings,
)
from cdiffset.inference.variance_readout import VARIANCE_READOUTS
from cdiffset.losses import target_of, training_loss
from cdiffset.model import load_scheduler, patch_conv_in, patch_conv_out
from cdiffset.pipeline import (
    ensemble,
    image_noise,
    image_seed,
    make_sampler,
    predict,
    reduce_samples,
    sample,
    starting_noise,
    translate,
    variance,
    variance_weights,
)

SIZE = (4, 16, 16)
PROMPT = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(9))
READ = {name: timesteps for name, (timesteps, _) in VARIANCE_READOUTS.items()} | {"all": PAPER_TIMESTEPS}


def latents(count: int, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(batch, *SIZE, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def nets() -> dict:
    """Stage 1 (4 out) and stage 2 (5 out) U-Nets; the variance channel has weights, so that σ² is not 1."""
    stage1, stage2 = patch_conv_in(tiny_unet()), patch_conv_out(patch_conv_in(tiny_unet()))
    torch.manual_seed(3)
    for unet in (stage1, stage2):
        torch.nn.init.normal_(unet.conv_in.weight, std=0.1)  # SAR and EO latent count differently
        torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    return {1: stage1, 2: stage2}


def plain_ddim(prediction_type: str = "epsilon") -> DDIMScheduler:
    """SD 2.1-base's schedule with the method's DDIM settings, every number written out."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading", prediction_type=prediction_type,
    )  # fmt: skip


def alpha_bar() -> torch.Tensor:
    return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)


class Probe:
    """Stands for a U-Net: records what it is fed, answers with `answer(input, call index)`."""

    dtype = torch.float32

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, x, timesteps, encoder_hidden_states):
        self.calls.append((x, timesteps, encoder_hidden_states))
        return SimpleNamespace(sample=self.answer(x, len(self.calls) - 1))


# ---------------------------------------------------------------------------------------------------------- one U-Net pass
def test_the_sar_latent_comes_first_and_the_variance_last():
    z_sar, z_t = latents(2)
    output = torch.arange(5.0)[None, :, None, None].expand(3, 5, 16, 16)
    probe = Probe(lambda x, _: output)
    prediction, raw = predict(probe, z_sar, z_t, torch.tensor([1, 2, 3]), PROMPT)
    seen, timesteps, prompt = probe.calls[0]
    assert torch.equal(seen[:, :4], z_sar) and torch.equal(seen[:, 4:], z_t)
    assert timesteps.tolist() == [1, 2, 3] and torch.equal(prompt, PROMPT.expand(3, -1, -1))
    assert torch.equal(prediction, output[:, :4]) and torch.equal(raw, output[:, 4:])


# ------------------------------------------------------------------------------------------------------------- the target
def recovered(prediction_type: str, z_t, prediction, a):
    """z_eo from z_t and a perfect prediction, a = ᾱ_t."""
    return {
        "epsilon": lambda: (z_t - (1 - a).sqrt() * prediction) / a.sqrt(),
        "sample": lambda: prediction,
        "v_prediction": lambda: a.sqrt() * z_t - (1 - a).sqrt() * prediction,
    }[prediction_type]()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_of_the_target_recovers_the_eo_latent(tiny_base, prediction_type):
    z_eo, noise = latents(2)
    timesteps = torch.tensor([0, 300, 700])
    a = alpha_bar()[timesteps][:, None, None, None]
    scheduler = load_scheduler(tiny_base, prediction_type)
    target = target_of(scheduler, z_eo, noise, timesteps)
    closed = {"epsilon": noise, "sample": z_eo, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * z_eo}[prediction_type]
    torch.testing.assert_close(target.double(), closed.double(), atol=1e-5, rtol=1e-5)
    z_t = a.sqrt() * z_eo + (1 - a).sqrt() * noise
    torch.testing.assert_close(recovered(prediction_type, z_t, target, a).double(), z_eo.double(), atol=1e-4, rtol=0)
    # The sampler's scheduler reads the same prediction the same way.
    scheduler.set_timesteps(50)
    step = scheduler.step(target[1:2], 300, z_t[1:2].float())
    torch.testing.assert_close(step.pred_original_sample, z_eo[1:2], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------- the training loss
def manual(unet, z_sar, z_eo, noise, timesteps):
    """=> the U-Net's output for a batch, straight from the method."""
    a = alpha_bar()[timesteps][:, None, None, None].float()
    z_t = a.sqrt() * z_eo + (1 - a).sqrt() * noise
    return unet(torch.cat([z_sar, z_t], 1), timesteps, PROMPT.repeat(len(z_t), 1, 1)).sample


def test_stage_1_trains_by_the_mse_on_the_noise(tiny_base, nets):
    z_sar, z_eo, noise = latents(3)
    timesteps = torch.tensor([3, 500, 999])
    loss, sigma2 = training_loss(
        nets[1], load_scheduler(tiny_base, "epsilon"), z_sar, z_eo, noise, timesteps, PROMPT, "timestep"
    )
    output = manual(nets[1], z_sar, z_eo, noise, timesteps)
    assert sigma2 is None and loss.item() == pytest.approx((output - noise).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("prediction_type", "beta"), [("epsilon", "timestep"), ("sample", "timestep"), ("epsilon", 0), ("sample", 0.5)]
)
def test_stage_2_trains_by_the_cdiff_loss(tiny_base, nets, prediction_type, beta):
    z_sar, z_eo, noise = latents(3)
    timesteps = torch.tensor([3, 500, 999])
    loss, mean_sigma2 = training_loss(
        nets[2], load_scheduler(tiny_base, prediction_type), z_sar, z_eo, noise, timesteps, PROMPT, beta
    )
    output = manual(nets[2], z_sar, z_eo, noise, timesteps).double()
    sigma2 = torch.nn.functional.softplus(output[:, 4:] + 0.5413230)  # c = log(e - 1) to 6 digits
    exponent = alpha_bar()[timesteps].sqrt() if beta == "timestep" else torch.full((3,), float(beta), dtype=torch.float64)
    error = ({"epsilon": noise, "sample": z_eo}[prediction_type] - output[:, :4]).square()
    nll = 0.5 * (error / sigma2 + sigma2.log() + 1.8378770664)
    expected = (sigma2 ** exponent[:, None, None, None] * nll).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    torch.testing.assert_close(mean_sigma2.double(), sigma2.mean(dim=(1, 2, 3)), rtol=2e-5, atol=0)
    assert not mean_sigma2.requires_grad and mean_sigma2.sub(1).abs().min() > 1e-3


def test_the_loss_reaches_every_parameter_of_the_net(tiny_base, nets):
    z_sar, z_eo, noise = latents(3)
    scheduler = load_scheduler(tiny_base, "epsilon")
    loss, _ = training_loss(nets[2], scheduler, z_sar, z_eo, noise, torch.tensor([3, 500, 999]), PROMPT, "timestep")
    gradients = torch.autograd.grad(loss, list(nets[2].parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


# ------------------------------------------------------------------------------------------------------------ the sampler
@pytest.mark.parametrize(("stage", "steps"), [(1, 7), (2, 50)])
def test_the_sampler_is_the_plain_ddim_loop(tiny_base, nets, stage, steps):
    z_sar, noise = latents(2, batch=2)
    z_eo, sigma2 = sample(nets[stage], load_scheduler(tiny_base, "epsilon"), z_sar, noise, PROMPT, steps)
    ddim, x = plain_ddim(), noise
    ddim.set_timesteps(steps)
    with torch.no_grad():
        for t in ddim.timesteps:
            output = nets[stage](torch.cat([z_sar, x], 1), t, PROMPT.repeat(2, 1, 1)).sample
            if t == 481:
                middle = output[:, 4:]
            x = ddim.step(output[:, :4], t, x).prev_sample
    assert torch.equal(z_eo, x)
    assert (sigma2 is None) == (stage == 1)
    if steps == 50 and stage == 2:  # the paper's: to the last bit
        assert torch.equal(sigma2, variance(middle))


# ------------------------------------------------------------------------------------------------ schedulers and spacings
SOLVERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
}  # every number written out, the rest diffusers' own defaults
SAMPLINGS = [(scheduler, spacing) for scheduler in SCHEDULERS for spacing in TIMESTEP_SPACINGS]


def sampler(base: str, scheduler: str, spacing: str, prediction_type: str = "epsilon"):
    return make_sampler(load_scheduler(base, prediction_type), scheduler, spacing)


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize(("name", "spacing"), SAMPLINGS)
def test_every_sampler_is_the_plain_diffusers_loop_time_and_again(tmp_path, name, spacing, steps):
    """From a base whose own sampler lends its noise schedule and nothing else."""
    schedule = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    other = {"use_karras_sigmas": True, "solver_order": 3, "algorithm_type": "sde-dpmsolver++", "euler_at_final": True}
    DPMSolverMultistepScheduler(**schedule, **other).save_pretrained(tmp_path / "scheduler")
    z_sar, noise = latents(2, batch=2)
    net = Probe(lambda x, _: (x[:, :4] + x[:, 4:]).sin() - net.calls[-1][1] / 1000)
    solver, settings = SOLVERS[name]
    plain, x = solver(**schedule, **settings, steps_offset=1, timestep_spacing=spacing, prediction_type="sample"), noise
    plain.set_timesteps(steps)
    for t in plain.timesteps:
        x = plain.step(net(torch.cat([z_sar, x], 1), t, None).sample, t, x).prev_sample
    ours = sampler(str(tmp_path), name, spacing, "sample")
    for _ in range(2):  # what a sampling remembers of its steps does not reach the next one
        assert torch.equal(sample(net, ours, z_sar, noise, PROMPT, steps)[0], x)
    assert ours.timesteps.tolist() == plain.timesteps.tolist() and len(ours.timesteps) == steps


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_trailing_timesteps_begin_at_pure_noise_and_are_spread_evenly(tiny_base, name, steps):
    scheduler = sampler(tiny_base, name, "trailing")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [round(1000 * (steps - k) / steps) - 1 for k in range(steps)]


@pytest.mark.parametrize(("name", "spacing"), SAMPLINGS)
def test_all_numbers_of_steps_that_are_allowed_keep_within_the_noise_schedule(tiny_base, name, spacing):
    scheduler = sampler(tiny_base, name, spacing)
    every = range(1, 51)
    for steps in (*every, *range(51, 999, 79), 999) if (name, spacing) == ("ddim", "leading") else every:
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
        assert len(timesteps) == len(set(timesteps)) == steps and timesteps == sorted(timesteps, reverse=True)
        assert 0 <= timesteps[-1] and timesteps[0] < 1000


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize(("name", "spacing"), SAMPLINGS)
def test_an_oracle_leads_every_sampler_to_the_eo_latent(tiny_base, name, spacing, steps, prediction_type):
    """Multistep solvers end without noise, at z_eo itself; DDIM ends at ᾱ_0, where sqrt(1 - ᾱ_0) of the first noise stays."""
    z_sar, z_eo, noise = latents(3)
    scheduler, alphas, noises = sampler(tiny_base, name, spacing, prediction_type), alpha_bar().float(), []

    def oracle(x, index):
        a, z_t = alphas[scheduler.timesteps[index]], x[:, 4:]
        eps = (z_t - a.sqrt() * z_eo) / (1 - a).sqrt()
        noises.append(eps)
        return {"epsilon": eps, "sample": z_eo, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * z_eo}[prediction_type]

    got, _ = sample(Probe(oracle), scheduler, z_sar, noise, PROMPT, steps)
    a = alphas[0] if name == "ddim" else torch.tensor(1.0)
    torch.testing.assert_close(got, a.sqrt() * z_eo + (1 - a).sqrt() * noises[-1], atol=2e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ translation
def images(*size: int) -> tuple[np.ndarray, torch.Tensor]:
    """Random images [B, H, W]: pixels [B, H, W, 3] in 0-255 and their tensors [B, 3, H, W] in [-1, 1]."""
    pixels = np.random.default_rng(2).uniform(0, 255, (*size, 3)).astype(np.float32)
    return pixels, torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def generator_seed(seed: int, pixels: np.ndarray) -> int:
    """The rule of the starting noise, number by number."""
    content = b"".join(struct.pack("<f", value) for value in pixels.reshape(-1).tolist())
    return int(hashlib.sha256(b"%d\x00" % seed + content).hexdigest()[:16], 16) // 2


def by_rule(seed: int, pixels: np.ndarray, *shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(generator_seed(seed, pixels)))


def test_every_image_has_a_seed_of_its_own():
    pixels, _ = images(3, 5, 7)
    for seed in (0, 2024, 2**40):
        assert [image_seed(seed, each) for each in pixels] == [generator_seed(seed, each) for each in pixels]
    assert image_seed(7, np.zeros((1, 2, 3), np.float32)) == 0x55372BA9A18746FF
    other = pixels[0].copy()
    other[-1, -1, -1] = np.nextafter(other[-1, -1, -1], np.float32(0))
    assert len({image_seed(0, each) for each in (*pixels, other)} | {image_seed(1, pixels[0])}) == 5
    eight_bit = pixels[0].round()
    assert image_seed(0, eight_bit.astype(np.uint8)) == image_seed(0, eight_bit.astype(">f4")) == image_seed(0, eight_bit)
    assert image_seed(0, np.asfortranarray(eight_bit)) == image_seed(0, eight_bit)  # the layout in memory says nothing


def test_images_of_a_batch_start_from_noise_of_their_own_at_the_padded_size():
    pixels, _ = images(2, 30, 37)
    noise = image_noise(tiny_vae(), 3, [pixels[0], pixels[1, :29, :40]])  # f = 4
    assert torch.equal(noise, torch.cat([by_rule(3, pixels[0], 4, 8, 10), by_rule(3, pixels[1, :29, :40], 4, 8, 10)]))
    assert (noise[0] - noise[1]).abs().mean() > 0.5


def test_the_starting_noise_is_a_function_of_seed_and_size():
    expected = torch.randn(1, *SIZE, generator=torch.Generator("cpu").manual_seed(11))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(starting_noise(11, SIZE), expected) and torch.equal(starting_noise(11, SIZE), expected)
    assert torch.equal(torch.get_rng_state(), before)  # nothing global is drawn from
    assert not torch.equal(starting_noise(12, SIZE), expected)


# ------------------------------------------------------------------------------------------------------- on another device
@pytest.fixture(scope="module")
def far_away() -> tuple:
    """A stage 2 U-Net, latents and a prompt on a device beside the CPU: "meta", whose values nobody can read."""
    unet = patch_conv_out(patch_conv_in(tiny_unet())).to("meta")
    return unet, torch.empty(3, *SIZE, device="meta"), PROMPT.to("meta")


@pytest.mark.parametrize(
    ("name", "spacing", "wanted"), [(*sampling, "all") for sampling in SAMPLINGS] + [("ddim", "leading", "midpoint")]
)
def test_sampling_never_waits_for_the_device(tiny_base, far_away, name, spacing, wanted):
    unet, z, prompt = far_away
    sampler = make_sampler(load_scheduler(tiny_base, "epsilon"), name, spacing)
    z_eo, sigma2 = sample(unet, sampler, z, z, prompt, 3, READ[wanted])
    assert z_eo.is_meta and z_eo.shape == z.shape and sigma2.is_meta and sigma2.shape == (3, 1, *SIZE[1:])
    with pytest.raises(RuntimeError, match="meta"):
        z_eo.max().item()  # as it would, had it looked


@pytest.mark.parametrize("beta", ["timestep", 0.5])
def test_neither_does_the_loss(tiny_base, far_away, beta):
    unet, z, prompt = far_away
    scheduler, timesteps = load_scheduler(tiny_base, "epsilon"), torch.empty(3, dtype=torch.long, device="meta")
    loss, sigma2 = training_loss(unet, scheduler, z, z, z, timesteps, prompt, beta)
    loss.backward()
    assert loss.is_meta and sigma2.shape == (3,) and all(parameter.grad.is_meta for parameter in unet.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_is_translated_as_its_images_alone(tiny_base, nets, stage):
    pixels, sar = images(4, 32, 32)
    vae, scheduler = tiny_vae(), load_scheduler(tiny_base, "epsilon")
    noise = image_noise(vae, 4, pixels)
    together, sigma2 = translate(nets[stage], vae, scheduler, sar, noise, PROMPT, 3)
    alone = [
        translate(nets[stage], vae, scheduler, image[None], image_noise(vae, 4, [own]), PROMPT, 3)
        for own, image in zip(pixels, sar, strict=True)
    ]
    assert together.shape == (4, 3, 32, 32) and together.abs().max() <= 1
    torch.testing.assert_close(together, torch.cat([eo for eo, _ in alone]), atol=1e-4, rtol=0)
    assert together.std(dim=0).mean() > 1e-3  # the images do differ
    if stage == 2:
        torch.testing.assert_close(sigma2, torch.cat([s for _, s in alone]), atol=1e-4, rtol=0)
    other_seed, _ = translate(nets[stage], vae, scheduler, sar, image_noise(vae, 5, pixels), PROMPT, 3)
    assert (other_seed - together).abs().max() > 1e-3


def test_translation_is_encode_sample_decode(tiny_base, nets):
    vae, scheduler = tiny_vae(), load_scheduler(tiny_base, "epsilon")
    pixels, sar = images(1, 32, 40)
    got, _ = translate(nets[2], vae, scheduler, sar, image_noise(vae, 6, pixels), PROMPT, 4)
    with torch.no_grad():
        z_sar = vae.encode(sar).latent_dist.mean * 0.7  # the tiny VAE's scaling factor
        noise = by_rule(6, pixels[0], 4, 8, 10)
        z_eo, _ = sample(nets[2], scheduler, z_sar, noise, PROMPT, 4)
        expected = vae.decode(z_eo / 0.7).sample.clamp(-1, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_bfloat16_net_translates_nearly_as_the_float32_one(tiny_base):
    unet = patch_conv_out(patch_conv_in(tiny_unet()))
    vae, scheduler = tiny_vae(), load_scheduler(tiny_base, "epsilon")
    pixels, sar = images(2, 32, 32)
    noise = image_noise(vae, 0, pixels)
    full, full_sigma2 = translate(unet, vae, scheduler, sar, noise, PROMPT, 4)
    half, half_sigma2 = translate(unet.bfloat16(), vae.bfloat16(), scheduler, sar, noise, PROMPT, 4)
    assert half.dtype == half_sigma2.dtype == torch.float32
    assert 0 < (half - full).abs().mean() < 0.02 and (half_sigma2 - full_sigma2).abs().max() < 0.02


# ---------------------------------------------------------------------------------------------- where the variance is read
def test_the_timesteps_read_are_those_of_the_papers_sampling(tiny_base):
    scheduler = load_scheduler(tiny_base, "epsilon")
    scheduler.set_timesteps(50)
    paper = scheduler.timesteps.tolist()
    assert list(PAPER_TIMESTEPS) == paper and MIDPOINT == paper[50 // 2]
    slices = {"midpoint": paper[25:26], "first": paper[:1], "early": paper[:13]}
    assert {readout: list(timesteps) for readout, (timesteps, _) in VARIANCE_READOUTS.items()} == slices
    for expected in slices.values():
        assert variance_weights(expected, paper) == {paper.index(timestep): 1.0 for timestep in expected}


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ([999, 499], {1: 1.0}),  # no step below: the nearest
        ([999], {0: 1.0}),
        ([1], {0: 1.0}),
        ([999, 749, 499, 249], {2: 232 / 250, 3: 18 / 250}),  # 481 between 499 and 249
        ([801, 601, 401, 201, 1], {1: 0.4, 2: 0.6}),
        ([961, 481, 1], {1: 1.0}),
    ],
)
def test_the_midpoint_is_interpolated_between_the_steps_beside_it(timesteps, expected):
    assert variance_weights((MIDPOINT,), timesteps) == pytest.approx(expected)


@pytest.mark.parametrize("wanted", READ.values(), ids=READ)
@pytest.mark.parametrize(
    ("name", "spacing", "steps"), [("ddim", "leading", 50), ("ddim", "trailing", 5), ("unipc", "trailing", 8)]
)
def test_the_variance_is_the_mean_over_the_timesteps_that_are_read(tiny_base, wanted, name, spacing, steps):
    z_sar, noise = latents(2)
    scheduler = sampler(tiny_base, name, spacing)
    raw = torch.randn(steps, 3, 1, 16, 16, generator=torch.Generator().manual_seed(8))
    probe = Probe(lambda x, index: torch.cat([x[:, 4:], raw[index]], 1))
    z_eo, sigma2 = sample(probe, scheduler, z_sar, noise, PROMPT, steps, wanted)
    # numpy's interpolation, cell by cell
    rising, values = scheduler.timesteps.tolist()[::-1], variance(raw).flatten(1).numpy()[::-1]
    at_each = [[np.interp(timestep, rising, cell) for cell in values.T] for timestep in wanted]
    expected = torch.tensor(np.mean(at_each, 0), dtype=torch.float32).reshape(sigma2.shape)
    torch.testing.assert_close(sigma2, expected, atol=1e-5, rtol=1e-5)
    plain, _ = sample(Probe(lambda x, _: x[:, 4:]), sampler(tiny_base, name, spacing), z_sar, noise, PROMPT, steps)
    assert torch.equal(z_eo, plain)  # where σ² is read does not touch the result


# --------------------------------------------------------------------------------------------------------------- ensembles
def test_members_of_an_ensemble_are_plain_translations(tiny_base, nets):
    vae, scheduler = tiny_vae(), load_scheduler(tiny_base, "epsilon")
    pixels, sar = images(2, 32, 32)
    noise = torch.stack([image_noise(vae, seed, pixels) for seed in range(5, 8)])
    samples, sigma2, spread = ensemble(nets[2], vae, scheduler, sar, noise, PROMPT, 3)
    plain = [translate(nets[2], vae, scheduler, sar, each, PROMPT, 3) for each in noise]
    assert torch.equal(samples, torch.stack([eo for eo, _ in plain]))  # to the last bit, at the same batch size
    torch.testing.assert_close(sigma2, sum(each for _, each in plain) / 3, atol=1e-6, rtol=1e-6)
    units = (samples.double() + 1) * 127.5
    deviation = ((units - units.mean(0)).square().sum(0) / 2).sqrt().mean(1, keepdim=True)
    torch.testing.assert_close(spread.double(), deviation, atol=1e-3, rtol=1e-4)
    assert spread.shape == (2, 1, 32, 32) and spread.mean() > 1
    for batch_size in (1, 4):
        others = ensemble(nets[2], vae, scheduler, sar, noise, PROMPT, 3, batch_size=batch_size)
        for one, other, atol in zip((samples, sigma2, spread), others, (1e-4, 1e-4, 1e-2), strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=0)


def test_one_member_has_no_spread_and_a_stage_1_net_no_variance(tiny_base, nets):
    pixels, sar = images(1, 32, 32)
    vae, scheduler = tiny_vae(), load_scheduler(tiny_base, "epsilon")
    samples, sigma2, spread = ensemble(nets[1], vae, scheduler, sar, image_noise(vae, 3, pixels)[None], PROMPT, 2)
    assert samples.shape == (1, 1, 3, 32, 32) and sigma2 is None and spread is None


@pytest.mark.parametrize("count", [1, 3, 4])
def test_samples_become_one_image(count):
    samples = torch.randn(count, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(reduce_samples(samples, "first"), samples[0])
    assert np.allclose(reduce_samples(samples, "mean"), samples.numpy().mean(0), atol=1e-6)
    assert np.allclose(reduce_samples(samples, "median"), np.median(samples.numpy(), axis=0), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ command line
@pytest.fixture
def parsed():
    def parse(*words: str) -> SamplingSettings:
        parser = argparse.ArgumentParser()
        add_translation_options(parser)
        return sampling_settings(parser.parse_args(["--checkpoint", "unet.safetensors", *words]))

    return parse


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_overridden_by_what_is_said(parsed, preset):
    def sampling(*words: str) -> tuple:
        args = parsed("--preset", preset, *words)
        return args.scheduler, args.timestep_spacing, args.num_inference_steps

    whole = PRESETS[preset][0]
    assert sampling() == whole and whole.scheduler == "ddim"  # scenes have no other
    assert sampling("--num-inference-steps", "7") == (*whole[:2], 7)
    assert sampling("--scheduler", "unipc", "--timestep-spacing", "trailing") == ("unipc", "trailing", whole[2])


def test_the_papers_sampling_is_the_default(parsed):
    args = parsed()
    assert (args.scheduler, args.timestep_spacing, args.num_inference_steps) == ("ddim", "leading", 50)
    assert calibrated_settings(args) == calibrated_settings(parsed("--preset", "paper"))
    assert calibrated_settings(args) != calibrated_settings(parsed("--preset", "fast"))


@pytest.mark.parametrize(
    "words",
    [("--preset", "fast", "--num-inference-steps", "51"), ("--scheduler", "unipc", "--num-inference-steps", "999")],
)
def test_many_steps_are_the_papers_alone(parsed, words):
    assert parsed("--num-inference-steps", "999").num_inference_steps == 999
    with pytest.raises(UserError, match="--num-inference-steps: expected at most 50 with .* more are for ddim leading"):
        parsed(*words)
