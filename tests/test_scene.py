"""Scenes: fused tiles against the plain sampler and an identity, restarts, georeference, and test.py on files and folders."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import Affine
from rio_cogeo.cogeo import cog_validate
from test_translate import command, files, save_checkpoint
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cdiffset.images import to_signed
from cdiffset.inference.options import SamplingSettings
from cdiffset.inference.translator import LoadedCheckpoint, Translator, load_checkpoint
from cdiffset.inference.variance_readout import VARIANCE_READOUTS
from cdiffset.pipeline import decode, encode, pad_to_multiple, sample, to_uint8, variance_map
from cdiffset.scenes import fusion as scene
from cdiffset.scenes.fusion import DiskArray, map_strips, translate_scene, variance_strips
from cdiffset.scenes.geotiff import open_scene
from cdiffset.scenes.options import TileSettings
from cdiffset.scenes.radiometry import Radiometry, RadiometryOptions
from cdiffset.scenes.tiles import blending_weights, fuse, make_grid, noise_field, strips

RNG = np.random.default_rng(0)
SMOOTH = Image.fromarray(RNG.integers(0, 256, (9, 13), dtype=np.uint8))
UTM = {"crs": "EPSG:32631", "transform": Affine(10, 0, 500_000, 0, -10, 5_700_000)}


def smooth(height: int, width: int) -> np.ndarray:
    return np.array(SMOOTH.resize((width, height), Image.Resampling.BICUBIC))


def save(path, band: np.ndarray, **profile):
    size = {"driver": "GTiff", "count": 1, "height": band.shape[0], "width": band.shape[1], "dtype": band.dtype}
    with rasterio.open(path, "w", **size, **profile) as target:
        target.write(band, 1)
    return path


def read(path) -> np.ndarray:
    with rasterio.open(path) as source:
        return source.read()


@pytest.fixture(scope="module")
def checkpoints(tiny_base, tmp_path_factory):
    return {outputs: save_checkpoint(tmp_path_factory.mktemp("stage"), tiny_base, outputs) for outputs in (4, 5)}


def words(checkpoint, sar, out, maps=True, **options) -> list[str]:
    options = {"num_inference_steps": 3, "device": "cpu", "tile": 64, "overlap": 32, "seed": 5, **options}
    given = ["--sar-dir", sar, "--output-dir", out / "eo", "--checkpoint", checkpoint]
    given += ["--conf-dir", out / "conf"] if maps else []
    for name, value in options.items():
        given += [] if value is None else [f"--{name.replace('_', '-')}", value]
    return [str(word) for word in given]


# ------------------------------------------------------------------------------------------------------------ the tiles
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 16), (7, 131), (45, 83), (64, 33)])
def test_tiles_cover_overlap_and_weigh_1_everywhere(size):
    grid = make_grid(*size, 16, 5)
    for starts, length, side in zip((grid.tops, grid.lefts), size, grid.tile, strict=True):
        assert starts[0] == 0 and starts[-1] + side == length
        assert all(0 < after - before <= side - 5 for before, after in zip(starts, starts[1:], strict=False))
        total = np.zeros(length)
        for start, weights in zip(starts, blending_weights(length, side, starts), strict=True):
            assert (weights > 0).all()
            total[start : start + side] += weights
        np.testing.assert_allclose(total, 1, rtol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (7, 131), (45, 83), (64, 33)])
def test_tiles_that_agree_come_back_to_the_last_bit(size):
    whole = RNG.normal(size=(3, *size)).astype(np.float32)
    grid = make_grid(*size, 16, 7)
    pieces = list(fuse(grid, (whole[:, rows, columns] for rows, columns in grid.windows())))
    assert sum(piece[0].size for _, _, piece in pieces) == whole[0].size
    assert all(np.array_equal(piece, whole[:, rows, columns]) for rows, columns, piece in pieces)
    got = list(strips(pieces, size[1]))
    assert np.array_equal(np.concatenate([strip for _, strip in got], 1), whole)
    assert [top for top, _ in got] == np.cumsum([0] + [strip.shape[1] for _, strip in got])[:-1].tolist()


@pytest.mark.parametrize("size", [(41, 29), (20, 33)])  # (20, 33): the second tile lies in the first to three quarters
def test_tiles_that_differ_are_averaged_by_their_weights(size):
    grid = make_grid(*size, 16, 6)
    tiles = RNG.normal(size=(len(grid.windows()), 2, *grid.tile))
    hann = np.sin(np.pi * (np.arange(16) + 0.5) / 16) ** 2
    total, weight = np.zeros((2, *size)), np.zeros(size)
    for k in RNG.permutation(len(tiles)):  # whatever the order
        total[(slice(None), *grid.windows()[k])] += tiles[k] * np.outer(hann, hann)
        weight[grid.windows()[k]] += np.outer(hann, hann)
    fused = np.concatenate([strip for _, strip in strips(fuse(grid, tiles), size[1])], 1)
    np.testing.assert_allclose(fused, total / weight, rtol=1e-5, atol=1e-6)


def test_noise_is_standard_normal_and_a_matter_of_seed_and_place_alone():
    noise = noise_field(3, 4, slice(0, 200), slice(0, 150))
    assert np.array_equal(noise[:, 121:190, 60:70], noise_field(3, 4, slice(121, 190), slice(60, 70)))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    blocks = [noise[:, top : top + 50, left : left + 50].ravel() for top in (0, 64, 128) for left in (0, 64)]
    blocks += [noise_field(seed, 4, slice(0, 50), slice(0, 50)).ravel() for seed in (4, 2**63 - 1)]
    assert np.abs(np.corrcoef(blocks) - np.eye(8)).max() < 0.05


# ------------------------------------------------------------------------------------------------------- whole scenes
class Identity:
    """Stands for VAE, U-Net and scheduler that change nothing: latents are the pixels, rearranged."""

    dtype, config = torch.float32, SimpleNamespace(latent_channels=48, scaling_factor=1.0, prediction_type="sample")
    init_noise_sigma, timesteps = 1.0, torch.tensor([2, 1])

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixel_unshuffle(pixels, 4)))

    def decode(self, latents):
        return SimpleNamespace(sample=pixel_shuffle(latents, 4))

    def __call__(self, latents, timestep, encoder_hidden_states):
        return SimpleNamespace(sample=latents[:, :48])

    def set_timesteps(self, steps, device=None): ...

    def step(self, prediction, timestep, z_t):
        return SimpleNamespace(prev_sample=prediction)


@pytest.mark.parametrize("size", [(131, 203), (65, 64), (9, 301)])
def test_an_identity_model_returns_its_input(tmp_path, size):
    same = Identity()
    checkpoint = LoadedCheckpoint(same, same, same, torch.zeros(1, 2, 4), torch.device("cpu"), "fp32", 4, {}, None, "0")
    sampling = SamplingSettings(1, "ddim", "leading", 2, "midpoint", 1, "first")
    model = SimpleNamespace(
        checkpoint=checkpoint, sampling=sampling, scheduler=same, variance_timesteps=(481,), on_progress=None
    )
    pixels = RNG.integers(0, 256, size, dtype=np.uint8)
    sar, outputs = [save(tmp_path / "a.tif", pixels)], {"eo": tmp_path / "eo/a.tif"}
    translate_scene(model, sar, outputs, TileSettings(64, 24), 5, RadiometryOptions())
    eo = read(tmp_path / "eo/a.tif")
    assert np.array_equal(eo[:3], np.stack([pixels] * 3)) and (eo[3] == 255).all()


@pytest.mark.parametrize(
    ("readout", "spacing"), [("midpoint", "leading"), ("first", "leading"), ("early", "leading"), ("early", "trailing")]
)
def test_a_scene_of_one_tile_is_the_plain_sampler(checkpoints, tmp_path, readout, spacing):
    pixels = smooth(75, 98)
    given = words(
        checkpoints[5], save(tmp_path / "a.tif", pixels), tmp_path, tile=128, readout=readout, timestep_spacing=spacing
    )  # fmt: skip
    outputs = {kind: tmp_path / f"{kind}.tif" for kind in ("variance", "eo")}
    translator = translate_alone(given, tmp_path / "a.tif", outputs)
    model = translator.checkpoint
    padded = pad_to_multiple(np.repeat(pixels[..., None], 3, -1).astype(np.float32), 4)
    with torch.no_grad():
        z_sar = encode(model.vae, torch.from_numpy(to_signed(padded)).permute(2, 0, 1)[None])
        noise = torch.from_numpy(noise_field(5, 4, slice(0, 19), slice(0, 25)))[None]
        z_eo, sigma2 = sample(
            model.unet, translator.scheduler, z_sar, noise, model.prompt_embedding, 3, VARIANCE_READOUTS[readout][0]
        )
        eo = to_uint8(decode(model.vae, z_eo))[0, :75, :98]
    assert np.abs(read(outputs["eo"])[:3].astype(int) - eo.transpose(2, 0, 1)).max() <= 1
    np.testing.assert_allclose(read(outputs["variance"])[0], variance_map(sigma2, (76, 100))[0, 0, :75, :98], rtol=1e-3)


def test_variance_strips_have_no_seams_and_carry_nodata(tmp_path, monkeypatch):
    monkeypatch.setattr(scene, "STRIP", 32)
    band = np.ones((118, 87), np.uint16)
    band[20:50, 11] = 0
    sigma2 = RNG.uniform(0.1, 2, (30, 22)).astype(np.float32)
    field = DiskArray(tmp_path / "field", (2, 30, 22))
    field.write(0, np.stack([np.full_like(sigma2, np.nan), sigma2]))
    with open_scene(save(tmp_path / "a.tif", band, nodata=0)) as source:
        plain, sigma2_strips = Radiometry((1,), "single", "dn", ()), variance_strips(field, 4)
        maps = map_strips(source, plain, sigma2_strips, ["variance"], [lambda maps: maps["variance"]])
        got = np.concatenate([strip for _, strip in maps], 1)[0]
    expected = variance_map(torch.from_numpy(sigma2)[None, None], (120, 88))[0, 0, :118, :87].numpy()
    np.testing.assert_allclose(got, np.where(band > 0, expected, np.nan), rtol=1e-5)


def test_the_batch_size_changes_no_more_than_the_last_bits(checkpoints, tmp_path):
    sar = save(tmp_path / "a.tif", smooth(100, 150))
    for size in (1, 4):
        assert command.main(words(checkpoints[5], sar, tmp_path / str(size), batch_size=size)) == 0
    eo, conf = ([read(tmp_path / size / kind / "a.tif") for size in "14"] for kind in ("eo", "conf"))
    assert np.abs(eo[0].astype(int) - eo[1]).max() <= 1
    np.testing.assert_allclose(*conf, rtol=1e-3, atol=1e-5)


# 12 tiles encoded, 3 steps of 12, 12 decoded; killed while encoding, in the first and the last step, while decoding.
@pytest.mark.parametrize(
    ("killed_at", "left", "said"), [(5, 60, ""), (15, 48, "step 0 of 3"), (40, 24, "step 2 of 3"), (55, 12, "step 3 of 3")]
)
def test_a_killed_run_goes_on_to_the_same_bytes(checkpoints, tmp_path, monkeypatch, capsys, killed_at, left, said):
    sar = save(tmp_path / "a.tif", smooth(120, 130), **UTM)
    assert command.main(words(checkpoints[5], sar, tmp_path / "whole")) == 0
    calls = []

    def counted(function):
        def call(*args):
            calls.append(function)
            if len(calls) == killed_at:
                raise KeyboardInterrupt
            return function(*args)

        return call

    for name in ("encode", "predict", "decode"):
        monkeypatch.setattr(scene, name, counted(getattr(scene, name)))
    with pytest.raises(KeyboardInterrupt):
        command.main(words(checkpoints[5], sar, tmp_path / "again"))
    assert not (tmp_path / "again/eo/a.tif").exists()
    assert command.main(words(checkpoints[5], sar, tmp_path / "again")) == 0
    assert len(calls) == killed_at + left
    assert ("goes on after " + said in capsys.readouterr().out) == bool(said)
    assert files(tmp_path / "whole") == files(tmp_path / "again")
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_run_with_other_settings_does_not_go_on_from_the_one_killed(checkpoints, tmp_path, monkeypatch):
    sar = save(tmp_path / "a.tif", smooth(100, 70))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(scene, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        command.main(words(checkpoints[4], sar, tmp_path / "out", maps=False, seed=1))
    for out in ("out", "fresh"):
        assert command.main(words(checkpoints[4], sar, tmp_path / out, maps=False, seed=2)) == 0
    assert np.array_equal(*(read(tmp_path / out / "eo/a.tif") for out in ("out", "fresh")))


def test_a_field_keeps_rows_of_its_channels(tmp_path):
    field, values = DiskArray(tmp_path / "field", (3, 10, 7)), RNG.normal(size=(3, 10, 7)).astype(np.float32)
    for top in (6, 0, 3):
        field.write(top, values[:, top : top + 4])
    assert np.array_equal(DiskArray(tmp_path / "field", (3, 10, 7)).read(slice(2, 9), slice(1, None)), values[1:, 2:9])
    with pytest.raises(OSError, match="shorter"):
        field.read(slice(8, 12))


def test_work_that_is_not_whole_is_not_gone_on_with(tmp_path):
    shapes = {"a": (1, 2, 3), "b": (2, 2, 3)}
    scene.Scratch(tmp_path / "scratch", {"seed": 1}, shapes).finish(4, "a")
    assert scene.Scratch(tmp_path / "scratch", {"seed": 1}, shapes).done == 4
    (tmp_path / "scratch" / "b.f32").unlink()
    assert scene.Scratch(tmp_path / "scratch", {"seed": 1}, shapes).done is None
    scene.Scratch(tmp_path / "scratch", {"seed": 1}, shapes).finish(4)
    assert scene.Scratch(tmp_path / "scratch", {"seed": 2}, shapes).done is None


# --------------------------------------------------------------------------------------------------- files and folders
ROTATED = {"crs": "EPSG:32631", "transform": Affine.translation(5e5, 5e6) * Affine.rotation(17) * Affine.scale(3, -2)}
POINTS = [GroundControlPoint(row, column, 4 + column / 1e3, 50 - row / 1e3, 2.5) for row in (0, 80.5) for column in (0, 99)]
RPCS = RPC(
    height_off=10, height_scale=500, lat_off=50, lat_scale=0.1, long_off=4, long_scale=0.1, line_off=50, line_scale=50,
    samp_off=60, samp_scale=60, line_num_coeff=list(range(20)), line_den_coeff=[1.0] * 20, samp_num_coeff=[2.0] * 20,
    samp_den_coeff=[1.0] * 20,
)  # fmt: skip


@pytest.mark.parametrize("georeference", [UTM, ROTATED, {"gcps": POINTS, "crs": "EPSG:4326"}, {"rpcs": RPCS}, {}])
def test_the_result_lies_where_the_scene_lies(checkpoints, tmp_path, georeference):
    sar = save(tmp_path / "a.tif", smooth(81, 100).astype(np.float32), **georeference)
    assert command.main(words(checkpoints[5], sar, tmp_path / "out")) == 0
    with rasterio.open(sar) as source:
        for kind in ("eo", "conf"):
            with rasterio.open(tmp_path / "out" / kind / "a.tif") as result:
                assert (result.shape, result.crs, result.transform) == (source.shape, source.crs, source.transform)
                assert [point.asdict() | {"id": 0} for point in result.gcps[0]] == [
                    point.asdict() | {"id": 0} for point in source.gcps[0]
                ]
                assert result.gcps[1] == source.gcps[1]
                assert (result.rpcs and result.rpcs.to_dict()) == (source.rpcs and source.rpcs.to_dict())


def test_outputs_are_cloud_optimized_and_say_how_they_were_made(checkpoints, tmp_path, caplog):
    band = smooth(700, 90).astype(np.uint16) * 40 + 1
    band[:70, :20] = 0
    sar = save(tmp_path / "a.tif", band, nodata=0, **UTM)
    assert command.main(words(checkpoints[5], sar, tmp_path / "out", num_inference_steps=2, tile=128, batch_size=4)) == 0
    for kind, dtypes in (("eo", ["uint8"] * 4), ("conf", ["float32"])):
        with rasterio.open(tmp_path / "out" / kind / "a.tif") as result:
            assert list(result.dtypes) == dtypes and result.overviews(1)
            assert result.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert cog_validate(result.name, strict=True) == (True, [], [])
            assert result.tags(ns="IMAGE_STRUCTURE")["COMPRESSION"] == "DEFLATE"
            limits = json.loads(result.tags()["CDIFFSET_STRETCH"])["limits"]
            np.testing.assert_allclose(limits, [np.percentile(band[band > 0], (1, 99))])
            assert (
                json.loads(result.tags()["CDIFFSET_SETTINGS"])["seed"] == 5 and len(result.tags()["CDIFFSET_CHECKPOINT"]) == 64
            )
            assert np.array_equal(result.dataset_mask() > 0, band > 0)
    conf = read(tmp_path / "out/conf/a.tif")[0]
    assert np.array_equal(np.isfinite(conf), band > 0) and np.nanmin(conf) > 0
    assert np.array(Image.open(tmp_path / "out/eo/a.quicklook.png")).shape == (700, 90, 4)
    assert not caplog.records  # GDAL's warnings, while writing, opening and reading
    assert files(tmp_path / "out") == {
        "eo/a.tif",
        "eo/a.quicklook.png",
        "eo/a.swipe.html",
        "conf/a.tif",
        "conf/a.qml",
    }  # nothing is left of the work


def test_a_folder_of_scenes_and_ordinary_images(checkpoints, tmp_path, capsys):
    folder = tmp_path / "sar"
    folder.mkdir()
    save(folder / "scene.tif", smooth(65, 40), **UTM)
    save(folder / "small.tif", smooth(64, 40))
    Image.fromarray(smooth(70, 40)).save(folder / "large.png")
    save(folder / "empty.tif", np.zeros((70, 70), np.uint16), nodata=0, **UTM)
    cut = save(folder / "cut.tif", smooth(900, 70), **UTM)
    cut.write_bytes(cut.read_bytes()[:50_000])
    save(folder / "complex.tif", np.zeros((70, 70), np.complex64), **UTM)
    assert command.main(words(checkpoints[5], folder, tmp_path / "out", tile=None, overlap=None)) == 1
    assert not [name for name in files(tmp_path / "out") if name.startswith("eo/.")]
    said = capsys.readouterr().err
    assert "empty.tif: not a single valid pixel" in said and "complex.tif: complex pixels" in said
    assert "cut.tif: truncated or damaged in rows" in said
    assert {"eo/scene.tif", "eo/small.png", "eo/large.png"} == {
        name for name in files(tmp_path / "out") if name.startswith("eo") and "quick" not in name and "swipe" not in name
    }
    (folder / "scene.tif").unlink()
    for name in ("empty.tif", "cut.tif", "complex.tif"):
        (folder / name).unlink()
    command.main(words(checkpoints[5], folder, tmp_path / "plain", tile=None, overlap=None))
    for name in ("eo/small.png", "eo/large.png", "conf/small.png"):  # as they are without scenes
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_scene_of_another_gsd_comes_back_on_its_own_grid(checkpoints, tmp_path, capsys):
    """Each pixel four times over and resampled by 2 is the scene itself; what comes back is its result, interpolated."""
    pixels = np.maximum(smooth(48, 70), 1)
    pixels[:8, :10] = 0
    coarse = save(tmp_path / "coarse.tif", pixels, nodata=0, crs="EPSG:32631", transform=Affine(2, 0, 5e5, 0, -2, 5e6))
    fine = save(tmp_path / "fine.tif", np.kron(pixels, np.ones((4, 4), np.uint8)), nodata=0, crs="EPSG:32631",
                transform=Affine(0.5, 0, 5e5, 0, -0.5, 5e6))  # fmt: skip
    assert command.main(words(checkpoints[5], coarse, tmp_path / "out")) == 0
    given = words(checkpoints[5], fine, tmp_path / "out", resample_gsd=2, stretch="fixed:0,255")
    assert command.main(given) == 0
    assert "280 x 192 px" in (said := capsys.readouterr().out) and "translated as 71 x 49 px" in said
    with rasterio.open(fine) as source, rasterio.open(tmp_path / "out/eo/fine.tif") as result:
        assert (result.shape, result.crs, result.transform) == (source.shape, source.crs, source.transform)
        assert np.array_equal(result.dataset_mask() > 0, source.dataset_mask() > 0)
        assert json.loads(result.tags()["CDIFFSET_STRETCH"])["pixel_ratio"] == pytest.approx([4.0, 4.0], rel=1e-3)
    for kind in ("eo", "conf"):
        small, large = read(tmp_path / f"out/{kind}/coarse.tif")[:3], read(tmp_path / f"out/{kind}/fine.tif")[:3]
        means = large[:, 40:].reshape(len(large), 38, 4, 70, 4).mean((2, 4))
        assert np.corrcoef(means[:, 2:].ravel(), small[:, 12:].ravel())[0, 1] > 0.9


def test_what_training_never_saw_is_told_and_recorded(checkpoints, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints[5], checkpoint)
    meta = json.loads((checkpoint / "checkpoint.json").read_text())
    meta |= {"gsd_m": 1.0, "sar_statistics": {"images": 9, "dtype": "uint8", "limits": [[9, 250]], "pixels": [20, 90, 200]}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(meta))
    sar = save(tmp_path / "a.tif", smooth(70, 75).astype(np.uint16) // 8 + 240, **UTM)
    assert command.main(words(checkpoint, sar, tmp_path / "out", stretch="dataset")) == 0
    said = capsys.readouterr().out
    with rasterio.open(tmp_path / "out/eo/a.tif") as result:
        found = result.tags()["CDIFFSET_OUT_OF_DOMAIN"].split("; ")
        assert json.loads(result.tags()["CDIFFSET_STRETCH"])["limits"] == [[0, 255]]
    assert found == [line.split("WARNING: ")[1] for line in said.splitlines() if "WARNING" in line]
    assert [each.split()[0] for each in found] == ["10", "pixels", "brightness", "a"]  # GSD, depth, median, range
    assert command.main([*words(checkpoint, sar, tmp_path / "again", num_inference_steps=1, gsd=2), "--resample-gsd"]) == 0
    assert "translated as 150 x 140 px" in (said := capsys.readouterr().out) and "WARNING: 10 m" not in said
    with pytest.raises(command.UserError, match="--stretch dataset: the checkpoint holds no statistics"):
        given = words(checkpoints[5], sar, tmp_path / "other", maps=False, stretch="dataset")
        translate_alone(given, sar, {"eo": tmp_path / "other" / "eo.tif"})


def translate_alone(given, sar, outputs) -> Translator:
    """Without the command around it, which goes on with the next scene after an error."""
    settings = command.settings_of(command.make_parser().parse_args(given))
    checkpoint = load_checkpoint(settings.model, settings.machine, with_fingerprint=True)
    translator = Translator(checkpoint, settings.sampling, settings.machine.batch_size)
    translate_scene(translator, [sar], outputs, settings.tiles, 1, settings.radiometry)
    return translator


def test_a_strip_of_65535_px_goes_through(checkpoints, tmp_path):
    sar = save(tmp_path / "a.tif", smooth(5, 65_535), **UTM)
    assert (
        command.main(words(checkpoints[4], sar, tmp_path / "out", maps=False, num_inference_steps=1, tile=2048, overlap=64))
        == 0
    )
    eo = read(tmp_path / "out/eo/a.tif")
    assert eo.shape == (4, 5, 65_535) and (eo[3] == 255).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": 100}, "--tile: expected a multiple of 64"),
        ({"overlap": 33}, "--overlap: expected at least 0 and at most 32"),
        ({"overlap": 12}, "--overlap: expected a multiple of 8"),
        ({"stretch": "data"}, "--stretch: expected"),
        ({"despeckle": "lee:4,1"}, "--despeckle: expected lee:SIZE,LOOKS or multilook:SIZE"),
        ({"gsd": "-1"}, "--gsd: invalid metres"),
        ({"ensemble": 2}, "--ensemble: not available for scenes of more than one tile"),
        ({"scheduler": "unipc"}, "--scheduler unipc: not available for scenes of more than one tile"),
    ],
)
def test_options_that_scenes_do_not_have_are_refused(checkpoints, tmp_path, changes, message):
    sar = save(tmp_path / "a.tif", smooth(70, 70))
    with pytest.raises(command.UserError, match=message):
        command.main(words(checkpoints[5], sar, tmp_path / "out", **changes))
