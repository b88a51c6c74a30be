"""The backbone: loading a base whole or not at all, the two patches, pixels <-> latents, the prompt embedding."""

import copy
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import tiny_unet, tiny_vae
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cdiffset.errors import UserError
from cdiffset.losses import training_loss
from cdiffset.model import (
    base_prediction_type,
    check_base,
    check_prompt_width,
    embed_prompt,
    load_base_unet,
    load_scheduler,
    load_unet,
    load_vae,
    patch_conv_in,
    patch_conv_out,
)
from cdiffset.pipeline import decode, encode, image_noise, to_uint8, translate, vae_factor

SD21_UNET = {  # the U-Net of Stable Diffusion 2.1-base
    "act_fn": "silu", "attention_head_dim": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "dual_cross_attention": False, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 64, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}  # fmt: skip
WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
LOADERS = {"vae": load_vae, "unet": load_base_unet, "text_encoder": lambda base: embed_prompt(base, "a")}


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    """A copy of the tiny base to damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_weights(file: Path, change) -> None:
    """Rewrite a safetensors file after `change(tensors)`."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def one_line_error(call, *arguments) -> str:
    """The message of the UserError that `call` must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, 4, 16, 16, generator=generator), torch.randn(batch, 5, 64, generator=generator)


# -------------------------------------------------------------------------------------------------------------- the patches
def test_the_patched_sd21_unet_has_the_published_size():
    with torch.device("meta"):
        unet = patch_conv_in(UNet2DConditionModel(**SD21_UNET))
        assert (len(unet.state_dict()), sum(p.numel() for p in unet.parameters())) == (686, 865_922_244)
        patch_conv_out(unet)
    assert (len(unet.state_dict()), sum(p.numel() for p in unet.parameters())) == (686, 865_925_125)
    assert unet.conv_in.weight.shape == (320, 8, 3, 3) and unet.conv_out.weight.shape == (5, 320, 3, 3)


def test_the_patches_change_the_two_layers_alone():
    before = tiny_unet().state_dict()
    after = patch_conv_out(patch_conv_in(tiny_unet())).state_dict()
    assert before.keys() == after.keys()
    kernel = before["conv_in.weight"]
    assert torch.equal(after["conv_in.weight"], torch.cat([kernel / 2, kernel / 2], 1))
    assert torch.equal(after["conv_in.bias"], before["conv_in.bias"]) and before["conv_in.bias"].any()
    for name in ("conv_out.weight", "conv_out.bias"):
        assert torch.equal(after[name][:4], before[name]) and not after[name][4:].any() and len(after[name]) == 5
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith(("conv_in.", "conv_out.")))


def test_the_patches_keep_the_type():
    unet = patch_conv_out(patch_conv_in(tiny_unet().bfloat16()))
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


def test_the_config_follows_the_patches_and_the_saved_folder_is_plain_diffusers(tmp_path):
    unet = patch_conv_in(tiny_unet())
    assert unet.config.in_channels == unet.config["in_channels"] == 8
    assert unet.config.out_channels == unet.config["out_channels"] == 4
    patch_conv_out(unet)
    assert unet.config.out_channels == unet.config["out_channels"] == 5
    unet.save_pretrained(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    z, prompt = inputs()
    with torch.no_grad():
        results = [net(torch.cat([z, -z], 1), 400, prompt).sample for net in (unet, loaded)]
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------------- pixels <-> latents
def test_encode_is_the_posterior_mean_times_the_scaling_factor():
    vae, pixels = tiny_vae(), torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        got = encode(vae, pixels)
        assert torch.equal(got, encode(vae, pixels))  # a sample would differ
    assert got.shape == (2, 4, 8, 12)
    torch.testing.assert_close(got, posterior.mean * 0.7, atol=1e-6, rtol=0)
    assert posterior.std.mean() > 0.1  # so that a sample would be told from the mean


def test_decode_undoes_the_scaling_and_stays_in_the_pixel_range():
    vae, z = tiny_vae(), torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(decode(vae, z), vae.decode(z / 0.7).sample.clamp(-1, 1), atol=1e-6, rtol=0)
        vae.decoder.conv_out.bias += torch.tensor([5.0, -5.0, 0.0])
        pixels = decode(vae, z)
    assert pixels.shape == (2, 3, 32, 48)
    assert (pixels[:, 0] == 1).all() and (pixels[:, 1] == -1).all() and pixels[:, 2].abs().mean() < 0.9


def test_half_precision_vaes_take_and_give_float32():
    vae, pixels = tiny_vae().bfloat16(), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z = encode(vae, pixels)
        assert z.dtype == torch.float32 and decode(vae, z).dtype == torch.float32
        torch.testing.assert_close(z, encode(tiny_vae(), pixels), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("levels", [1, 4])
def test_the_factor_follows_from_the_vaes_levels(levels):
    vae = AutoencoderKL(
        block_out_channels=[8] * levels, down_block_types=["DownEncoderBlock2D"] * levels, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=1,
    )  # fmt: skip
    assert vae_factor(vae) == 2 ** (levels - 1)
    with torch.no_grad():
        assert encode(vae, torch.zeros(1, 3, 32, 64)).shape[-2:] == (32 // vae_factor(vae), 64 // vae_factor(vae))


def test_the_vae_is_frozen(tiny_base):
    vae = load_vae(tiny_base)
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())
    assert {parameter.dtype for parameter in load_vae(tiny_base, torch.bfloat16).parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------- the prompt
@pytest.mark.parametrize("prompt", ["electro-optical image", "", "a" * 200])
def test_the_prompt_embedding_is_the_text_encoders_without_padding(tiny_base, prompt):
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder", dtype=torch.float32)
    tokens = tokenizer(prompt)["input_ids"]
    if len(tokens) > 77:
        tokens = [*tokens[:76], tokens[-1]]  # cut to what the encoder takes, the end token kept
    with torch.no_grad():
        expected = text_encoder(torch.tensor([tokens])).last_hidden_state
    got = embed_prompt(tiny_base, prompt)
    assert got.shape == (1, min(len(tokens), 77), 64) and got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_a_unet_of_another_prompt_width_is_refused(tiny_base):
    embedding = embed_prompt(tiny_base, "")
    check_prompt_width(tiny_unet(), embedding, tiny_base, "--checkpoint")
    message = one_line_error(check_prompt_width, tiny_unet(cross_attention_dim=48), embedding, tiny_base, "--checkpoint")
    assert message.startswith("--checkpoint: ") and "48" in message and "64" in message


# ---------------------------------------------------------------------------------------------------------- the scheduler
@pytest.mark.parametrize("other", ["pndm", "ddim of other settings", "dpm"])
def test_the_sampler_has_the_methods_settings_whatever_the_bases_scheduler(base, other):
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if other.startswith("ddim"):
        others = {"clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "trailing"}
        DDIMScheduler(**schedule, **others, prediction_type="v_prediction").save_pretrained(base / "scheduler")
    elif other == "dpm":
        DPMSolverMultistepScheduler(**schedule).save_pretrained(base / "scheduler")
    scheduler = load_scheduler(str(base), "epsilon")
    wanted = {
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading",
        "prediction_type": "epsilon", "num_train_timesteps": 1000,
    }  # fmt: skip
    assert isinstance(scheduler, DDIMScheduler) and {name: scheduler.config[name] for name in wanted} == wanted
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=0, rtol=1e-4)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:2].tolist() == [981, 961] and scheduler.timesteps[-1] == 1


# --------------------------------------------------------------------------------------------------------- bases that fail
def test_a_missing_base_folder_is_named_with_the_ways_to_get_one(tmp_path):
    for missing in (str(tmp_path / "nothing"), "./nothing", "~/surely/not/here", "a/b/c"):
        message = one_line_error(check_base, missing)
        assert missing in message and "Hugging Face Hub" in message and "local folder" in message


def test_every_missing_component_is_named(base):
    check_base(str(base))
    for name in ("vae", "tokenizer"):
        shutil.rmtree(base / name)
    message = one_line_error(check_base, str(base))
    assert "it lacks tokenizer/, vae/;" in message and str(base) in message


def test_a_base_in_the_home_directory_may_be_written_with_a_tilde(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    check_base("~/base")
    assert torch.equal(load_vae("~/base").encoder.conv_in.weight, tiny_vae().encoder.conv_in.weight)


def test_a_base_says_what_its_unet_predicts(base):
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(base / "scheduler")
    assert (
        base_prediction_type(str(base)) == "v_prediction"
        and load_scheduler(str(base), "epsilon").config.prediction_type == "epsilon"
    )
    (base / "scheduler/scheduler_config.json").write_text('{"_class_name": "PNDMScheduler"}')
    assert base_prediction_type(str(base)) == "epsilon"


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("damage", ["truncated", "no safetensors", "absent"])
def test_damaged_weights_are_refused(base, component, damage):
    file = base / component / WEIGHTS[component]
    content = file.read_bytes()
    file.unlink()
    if damage != "absent":
        file.write_bytes({"truncated": content[: len(content) // 2], "no safetensors": b"x" * 1000}[damage])
    message = one_line_error(LOADERS[component], str(base))
    assert f"{component}/ of the base model" in message and str(base) in message


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_a_wrong_set_of_tensors_is_refused_and_never_filled_with_random_ones(base, component, fault):
    def damage(tensors):
        name = next(name for name in sorted(tensors) if name.endswith("weight") and tensors[name].dim() > 1)
        if fault == "unexpected":
            tensors["surplus.weight"] = torch.zeros(3)
        else:
            tensor = tensors.pop(name)
            if fault == "mismatched":
                tensors[name] = tensor[:-1].contiguous()

    edit_weights(base / component / WEIGHTS[component], damage)
    message = one_line_error(LOADERS[component], str(base))
    assert f"{component}/ of the base model" in message
    if fault != "mismatched":
        assert f"1 {fault}" in message


@pytest.mark.parametrize("component", ["vae", "unet", "text_encoder"])
def test_a_component_that_lacks_files_is_refused_by_their_names(base, component):
    (base / component / "config.json").unlink()
    assert f"{component}/ of the base model {str(base)!r} lacks config.json;" in one_line_error(LOADERS[component], str(base))
    name = WEIGHTS[component]
    (base / component / name).unlink()
    message, stem = one_line_error(LOADERS[component], str(base)), name.partition(".")[0]
    assert f" lacks config.json and {name} (or " in message and f", or {stem}.fp16.safetensors)" in message


def test_an_empty_scheduler_folder_is_refused(base):
    (base / "scheduler/scheduler_config.json").unlink()
    assert "lacks scheduler_config.json" in one_line_error(load_scheduler, str(base), "epsilon")


# ------------------------------------------------------------------------------------------------------------ fp16 variants
def save_fp16(base: Path, **options) -> dict[str, dict]:
    """Replace the weights of a base by their fp16 variant => the float32 values to be loaded, by component."""
    expected = {}
    for component, loader in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        network = loader.from_pretrained(base / component).half()
        expected[component] = {name: tensor.float() for name, tensor in network.state_dict().items()}
        (base / component / WEIGHTS[component]).unlink()
        network.save_pretrained(base / component, variant="fp16", **options)
        assert not (base / component / WEIGHTS[component]).exists()
    return expected


def assert_loads(base: str, expected: dict[str, dict], prompt: torch.Tensor) -> None:
    for component, load in (("vae", load_vae), ("unet", load_base_unet)):
        found = load(base).state_dict()
        assert found.keys() == expected[component].keys()
        assert all(found[name].dtype == torch.float32 for name in found)
        assert all(torch.equal(found[name], expected[component][name]) for name in found)
    torch.testing.assert_close(embed_prompt(base, "electro-optical image"), prompt, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "split"])
def test_a_base_that_holds_only_fp16_files_loads_as_float32(base, options):
    prompt = embed_prompt(str(base), "electro-optical image")
    expected = save_fp16(base, **options)
    assert_loads(str(base), expected, prompt)


def test_plain_files_go_before_their_fp16_variant(base):
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    expected = copy.deepcopy(unet.state_dict())
    torch.nn.init.zeros_(unet.conv_in.weight)
    unet.half().save_pretrained(base / "unet", variant="fp16")
    assert torch.equal(load_base_unet(str(base)).conv_in.weight, expected["conv_in.weight"])


def test_a_base_of_the_hub_with_only_fp16_files_loads(base, tmp_path, monkeypatch):
    """From a cache as the Hub's client lays it out."""
    prompt, expected = embed_prompt(str(base), "electro-optical image"), save_fp16(base)
    repo, commit = tmp_path / "hub" / "models--someone--half", "01234567" * 5
    shutil.copytree(base, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for module in list(sys.modules.values()):  # each has read its place when it was imported
        if module and isinstance(vars(module).get("HF_HUB_CACHE"), str):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_loads("someone/half", expected, prompt)


@pytest.mark.parametrize("absent", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_tokenizer_without_a_vocabulary_is_refused(base, absent):
    """transformers would make every word the same unknown token."""
    for name in absent:
        (base / "tokenizer" / name).unlink()
    assert "tokenizer/ of the base model" in one_line_error(embed_prompt, str(base), "a")


def test_the_text_encoder_says_how_long_a_prompt_may_be(base, tiny_base):
    (base / "tokenizer/tokenizer_config.json").unlink()
    assert torch.equal(embed_prompt(str(base), "a" * 200), embed_prompt(tiny_base, "a" * 200))


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_hub_name_without_a_network_is_one_line_with_the_ways_out(monkeypatch, load):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_base("someone/no-such-model")  # only the loading can tell
    message = one_line_error(load, "someone/no-such-model")
    assert "someone/no-such-model" in message and "Hugging Face Hub" in message and "local folder" in message


# ------------------------------------------------------------------------------------------------------- other, older bases
def test_older_tensor_names_load_without_loss(base, tiny_base):
    """The published base names its tensors as diffusers and transformers did in 2022."""
    old_attention = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = []

    def to_old_vae(tensors):
        for name in [name for name in tensors if ".attentions." in name and "group_norm" not in name]:
            new, old = next((new, old) for new, old in old_attention.items() if f".{new}." in name)
            tensors[name.replace(new, old)] = tensors.pop(name)
            renamed.append(name)

    def to_old_text_encoder(tensors):
        for name in [name for name in tensors if not name.startswith("text_model.")]:
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # a buffer that files held then
        assert "text_model.embeddings.token_embedding.weight" in tensors

    edit_weights(base / "vae" / WEIGHTS["vae"], to_old_vae)
    edit_weights(base / "text_encoder" / WEIGHTS["text_encoder"], to_old_text_encoder)
    assert len(renamed) == 2 * 4 * 2  # encoder and decoder, 4 projections, weight and bias
    expected, got = tiny_vae().state_dict(), load_vae(str(base)).state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert torch.equal(embed_prompt(str(base), "electro-optical image"), embed_prompt(tiny_base, "electro-optical image"))


def test_a_base_of_other_widths_works_from_end_to_end(base):
    """6 latent channels, prompts of width 48, f = 2, another scaling factor: nothing of SD 2.1 is assumed."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1, latent_channels=6, norm_num_groups=4, scaling_factor=0.3,
    ).save_pretrained(base / "vae")  # fmt: skip
    tiny_unet(in_channels=6, out_channels=6, cross_attention_dim=48).save_pretrained(base / "unet")
    config = json.loads((base / "text_encoder/config.json").read_text())
    CLIPTextModel(CLIPTextConfig(**{**config, "hidden_size": 48})).save_pretrained(base / "text_encoder")

    vae, prompt, scheduler = load_vae(str(base)), embed_prompt(str(base), "x"), load_scheduler(str(base), "epsilon")
    unet = patch_conv_out(patch_conv_in(load_base_unet(str(base))))
    assert (unet.config.in_channels, unet.config.out_channels, vae_factor(vae)) == (12, 7, 2)
    check_prompt_width(unet, prompt, str(base), "base")
    unet.save_pretrained(base.parent / "stage2")
    loaded, _ = load_unet(str(base.parent / "stage2"), str(base), 6, "checkpoint")
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = encode(vae, pixels)
    loss, sigma2 = training_loss(loaded, scheduler, z, z, torch.randn_like(z), torch.tensor([1, 2]), prompt, "timestep")
    torch.testing.assert_close(sigma2, torch.ones(2))
    assert z.shape == (2, 6, 8, 8) and torch.isfinite(loss)
    eo, sigma2 = translate(loaded, vae, scheduler, pixels, image_noise(vae, 0, to_uint8(pixels)), prompt, 2)
    assert eo.shape == (2, 3, 16, 16) and sigma2.shape == (2, 1, 8, 8)
