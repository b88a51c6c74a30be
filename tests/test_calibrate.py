"""Calibration: curves recover a known relation, intervals cover, files are checked; calibrate.py and test.py end to end."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import tiny_unet
from PIL import Image
from sklearn.isotonic import IsotonicRegression

import calibrate
from cdiffset import errors
from cdiffset.calibration import calibration
from cdiffset.calibration.calibration import MIN_ERROR, SPREAD_WEIGHTS, Calibration, Curve
from cdiffset.calibration.error_pictures import (
    ANCHORS,
    ERROR_VIEW_MAX,
    HATCH_COLOUR,
    colours,
    enlarged,
    error_view,
    overlay,
    variance_view,
)
from cdiffset.errors import UserError

REPO = Path(__file__).parents[1]
SETTINGS = {
    "readout": "midpoint", "scheduler": "ddim", "timestep_spacing": "leading", "num_inference_steps": 2, "ensemble": 1,
    "ensemble_output": "first",
}  # fmt: skip

_spec = importlib.util.spec_from_file_location("translation_command", REPO / "test.py")  # `test` is Python's own package
translation = importlib.util.module_from_spec(_spec)
sys.modules["translation_command"] = translation
_spec.loader.exec_module(translation)


def true_relation(values: np.ndarray) -> np.ndarray:
    return 5 + 20 * np.sqrt(values)


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A map [n] and errors [n], not negative, whose mean is the true relation."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(2, 0.5, count)
    return values, true_relation(values) * rng.gamma(4, 1 / 4, count)


# --------------------------------------------------------------------------------------------------------------- curves
def test_a_curve_is_interpolated_and_constant_beyond_its_ends():
    curve = Curve([1.0, 2.0, 4.0], [10.0, 20.0, 30.0])
    assert curve(np.array([[0.0, 1.0, 1.5], [3.0, 4.0, 9.0]])).tolist() == [[10, 10, 15], [25, 30, 30]]


def test_a_curve_of_few_values_is_plain_isotonic_regression():
    """Fewer values than bins: each is its own, and a falling pair is pooled to its mean."""
    curve = calibration.fit_curve(np.array([4.0, 1.0, 2.0, 3.0]), np.array([9.0, 1.0, 6.0, 4.0]))
    assert curve == Curve([1.0, 2.0, 3.0, 4.0], [1.0, 5.0, 5.0, 9.0])
    values, error = drawn(150)
    plain = IsotonicRegression().fit(values, error)
    assert np.allclose(calibration.fit_curve(values, error)(values), plain.predict(values))


def test_a_curve_recovers_the_relation():
    curve = calibration.fit_curve(*drawn(200_000))
    assert 50 < len(curve.x) <= calibration.KNOTS and (np.diff(curve.y) >= 0).all() and (np.diff(curve.x) > 0).all()
    asked = np.linspace(0.1, 3, 50)
    assert np.abs(curve(asked) / true_relation(asked) - 1).max() < 0.05


def test_ties_constants_and_errors_of_0_make_a_curve_still():
    values = np.repeat([0.5, 1.5], 500)
    curve = calibration.fit_curve(values, np.arange(1000) % 2 + values)
    assert np.allclose(curve(np.array([0.5, 1.5])), [1.0, 2.0])
    flat = calibration.fit_curve(np.ones(1000), np.zeros(1000))
    assert flat(np.array([0.0, 1.0, 5.0])).tolist() == [MIN_ERROR] * 3


@pytest.mark.parametrize("informative", ["variance", "spread"])
def test_of_two_maps_the_one_that_knows_counts(informative):
    values, error = drawn(100_000)
    noise = np.random.default_rng(9).random(len(values))
    maps = {name: values if name == informative else noise for name in ("variance", "spread")}
    curves, spread_weight, joint = calibration.fit(maps, error)
    fitted = Calibration({}, "", curves, spread_weight, joint)
    assert np.abs(fitted.expected_error(maps) / true_relation(values) - 1).mean() < 0.03


def test_the_weight_is_the_second_maps():
    maps = {"variance": np.array([1.0, 16.0]), "spread": np.array([16.0, 81.0])}
    as_they_are = dict.fromkeys(maps, Curve([0, 100], [0, 100]))
    for joint, expected in ((Curve([0, 100], [0, 100]), [2.0, 24.0]), (Curve([0, 100], [0, 200]), [4.0, 48.0])):
        np.testing.assert_allclose(Calibration({}, "", as_they_are, 0.25, joint).expected_error(maps), expected)


def test_two_maps_that_both_know_beat_each():
    rng = np.random.default_rng(3)
    one, two = rng.gamma(2, 0.5, (2, 100_000))
    error = 10 * np.sqrt(one * two) * rng.gamma(4, 1 / 4, len(one))
    maps = {"variance": one, "spread": two}
    curves, spread_weight, joint = calibration.fit(maps, error)
    squared = [np.mean((curve(maps[name]) - error) ** 2) for name, curve in curves.items()]
    together = np.mean((Calibration({}, "", curves, spread_weight, joint).expected_error(maps) - error) ** 2)
    assert spread_weight in SPREAD_WEIGHTS[1:-1] and together < 0.8 * min(squared)


# ------------------------------------------------------------------------------------------------------------ held out
def test_the_conformal_quantile_is_the_ranked_score():
    error, expected = np.array([1.0, 8.0, 3.0, 10.0]), np.array([1.0, 2.0, 1.0, 5.0])  # scores 1, 4, 3, 2
    assert [calibration.conformal_quantile(expected, error, level) for level in (0.2, 0.4, 0.5, 0.8)] == [1, 2, 3, 4]


def test_intervals_cover_new_pixels_of_the_same_kind():
    curve = calibration.fit_curve(*drawn(100_000))
    expected, (values, error) = curve(drawn(20_000, 1)[0]), drawn(20_000, 2)
    for level in calibration.LEVELS:
        q = calibration.conformal_quantile(expected, drawn(20_000, 1)[1], level)
        assert abs(np.mean(error <= q * curve(values)) - level) < 0.015


def test_the_held_out_report_by_hand():
    """Two pixels, hence two bins: 1 expected and 2 found, 4 expected and 3 found => ENCE (1 + 1/4) / 2."""
    identity = Calibration(SETTINGS, "", {"variance": Curve([1.0, 4.0], [1.0, 4.0])}, quantiles={"0.5": 1.0, "0.9": 2.0})
    report = calibration.evaluate(identity, {"variance": 2.0}, {"variance": np.array([4.0, 1.0])}, np.array([3.0, 2.0]))
    assert report["mean_error"] == 2.5 and report["ence_after"] == 0.625
    assert report["ence_before"] == {"variance": 0.125}  # 2 σ is 4 and 2
    assert report["coverage"] == {"0.5": 0.5, "0.9": 1.0}
    assert report["reliability"] == {"predicted": [1, 4], "observed": [2, 3]}


def test_a_spread_of_0_is_calibrated_still():
    values, error = drawn(1000)
    maps = {"variance": values, "spread": np.zeros(1000)}
    part = (maps, error)
    parts = {"fit": (maps | {"spread": values}, error), "intervals": part, "held_out": part}
    report = calibrate.fit_calibration(parts, {}, "").report
    assert np.isfinite(list(report["ence_before"].values())).all() and np.isfinite(report["ence_after"])


def test_calibrating_lowers_the_ence_to_near_0():
    def part(seed):
        values, error = drawn(100_000, seed)
        return {"variance": values}, error

    fitted = calibrate.fit_calibration({"fit": part(0), "intervals": part(1), "held_out": part(2)}, SETTINGS, "model")
    report = fitted.report
    assert report["ence_after"] < 0.02 < 0.07 < report["ence_before"]["variance"]
    assert all(abs(found - float(level)) < 0.01 for level, found in report["coverage"].items())
    assert np.allclose(report["reliability"]["predicted"], report["reliability"]["observed"], rtol=0.05)
    assert report["pixels"] == {"fit": 100_000, "intervals": 100_000, "held_out": 100_000}


@pytest.mark.parametrize("count", [4, 5, 7, 160])
def test_the_split_uses_every_image_once(count):
    parts = calibrate.split(count, 3)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    assert [len(parts[name]) for name in ("intervals", "held_out")] == [max(1, count // 4)] * 2
    again, other = calibrate.split(count, 3), [calibrate.split(count, seed)["fit"].tolist() for seed in range(9)]
    assert all(np.array_equal(parts[name], again[name]) for name in parts) and len({str(each) for each in other}) > 1


# ---------------------------------------------------------------------------------------------------------------- files
GOOD = Calibration(
    SETTINGS, "abc", {"variance": Curve([1.0, 2.0], [3.0, 3.5]), "spread": Curve([0.1], [4.0])}, 0.5,
    Curve([3.0, 4.0], [3.0, 5.0]), {"0.5": 0.8}, {"ence_after": 0.1},
)  # fmt: skip


def test_what_is_saved_is_loaded(tmp_path):
    for each in (GOOD, Calibration(SETTINGS, "abc", {"variance": Curve([0.1, 1 / 3], [3.0, 1e9 / 3])})):
        calibration.save(tmp_path / "a" / "c.json", each)
        assert calibration.load(tmp_path / "a" / "c.json", SETTINGS) == each
        before = (tmp_path / "a" / "c.json").read_bytes()
        calibration.save(tmp_path / "a" / "c.json", each)
        assert (tmp_path / "a" / "c.json").read_bytes() == before


def test_the_file_lies_beside_the_checkpoint(tmp_path):
    assert calibration.path_beside(tmp_path) == tmp_path / "calibration.json"
    assert calibration.path_beside(tmp_path / "a.b.safetensors") == tmp_path / "a.b.calibration.json"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda v: v.pop("curves"), "lacks 'curves'"),
        (lambda v: v.update(curves={}), "curves of nothing"),
        (lambda v: v.update(curves={"entropy": {"x": [1], "y": [1]}}), "curves of entropy"),
        (lambda v: v.update(curves=[]), "is no calibration"),
        (lambda v: v.update(spread_weight=None), "two curves need spread_weight"),
        (lambda v: v.update(spread_weight=2), "spread_weight 2, expected 0 to 1"),
        (lambda v: v["joint"].update(x=[3, 3]), "'joint': x must be finite and rising"),
        (lambda v: v["joint"].update(y=[5, 3]), "not falling"),
        (lambda v: v["joint"].update(y=[0, 3]), "above 0"),
        (lambda v: v["curves"]["variance"].update(y=[3, float("nan")]), "y finite"),
        (lambda v: v["curves"]["variance"].update(y=[3]), "lists of one length"),
        (lambda v: v["curves"]["variance"].update(x=[]), "lists of one length"),
        (lambda v: v["curves"]["variance"].update(x="high"), "is no calibration"),
        (lambda v: v.update(quantiles={"0.5": 0}), "quantiles"),
        (lambda v: v.update(model=7), "wrong type"),
        (lambda v: v["settings"].update(readout="first"), "was made with readout first, .*: give it the same, or calibrate"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    calibration.save(tmp_path / "c.json", GOOD)
    values = json.loads((tmp_path / "c.json").read_text())
    damage(values)
    (tmp_path / "c.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        calibration.load(tmp_path / "c.json", SETTINGS)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_what_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(UserError, match="is no calibration, expected what calibrate.py writes"):
        calibration.load(tmp_path / "c.json", SETTINGS)


# ------------------------------------------------------------------------------------------------------------- pictures
def test_the_colours_rise_in_lightness():
    ramp = colours(np.linspace(0, ERROR_VIEW_MAX, 200)[None]).astype(float)[0]
    lightness = ramp @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) >= 0).all() and lightness[-1] - lightness[0] > 200
    assert np.array_equal(colours(np.array([[0, 64, 200]])), [[ANCHORS[0], ANCHORS[-1], ANCHORS[-1]]])


@pytest.mark.parametrize("size, factor", [((64, 64), 4), ((1, 1), 256), ((512, 300), 1), ((200, 130), 2), ((1, 4000), 1)])
def test_the_view_shows_the_error_beside_a_bar(size, factor):
    expected = np.random.default_rng(0).random(size) * 80
    view = error_view(expected)
    height, width = size[0] * factor, size[1] * factor
    assert view.dtype == np.uint8 and view.shape[0] >= height and width < view.shape[1] < width + 80
    assert np.array_equal(view[:height:factor, :width:factor], colours(expected))
    bar = view[:, width + 8].astype(int)
    assert (bar == ANCHORS[0].astype(int)).all(1).any() and (bar == ANCHORS[-1].astype(int)).all(1).any()
    assert (view[:, width + 22 :] < 128).all(2).any()  # labels


def test_the_view_of_a_variance_spans_its_percentiles_and_leaves_gaps_white():
    sigma2 = np.linspace(0.5, 2.5, 10_201).reshape(101, 101)
    sigma2[0, :50] = np.nan
    view, known = variance_view(sigma2), sigma2[np.isfinite(sigma2)]
    shown = view[: 101 * 3 : 3, : 101 * 3 : 3]  # enlarged to at least 256 px
    assert (shown[0, :50] == 255).all()
    low, high = np.percentile(known, (1, 99))
    between = (sigma2 > low) & (sigma2 < high)
    assert np.array_equal(shown[between], colours((sigma2 - low) / (high - low) * ERROR_VIEW_MAX)[between])
    assert (shown[sigma2 < low] == ANCHORS[0]).all() and (shown[sigma2 > high] == ANCHORS[-1]).all()
    assert (variance_view(np.full((300, 300), np.nan))[:300, :300] == 255).all()


def test_the_overlay_marks_what_is_above_the_threshold_alone():
    eo = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    expected = np.zeros((64, 96))
    expected[20:40, 30:60] = 10.5
    assert np.array_equal(overlay(eo, expected, 10.5), enlarged(eo))  # above, not at
    marked = overlay(eo, expected, 10)
    high = enlarged(expected) > 10
    assert marked.shape == (192, 288, 3) and np.array_equal(marked[~high], enlarged(eo)[~high])
    change = np.abs(marked.astype(int) - enlarged(eo)).max(-1)
    assert (change[high] > 0).mean() > 0.95
    assert (marked[60, 90:180] == HATCH_COLOUR).all() and (marked[60:120, 90] == HATCH_COLOUR).all()  # the outline
    inside = change[65:115, 95:175]
    assert np.ptp(inside) > 60  # lines and what lies between them


# --------------------------------------------------------------------------------------------------------- command lines
@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_base) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, outputs, scale in (("stage2", 5, 60), ("other", 5, 61), ("stage1", 4, 1)):
        unet = tiny_unet(in_channels=8, out_channels=outputs)
        unet.conv_out.weight.data[-1] *= scale
        unet.save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


def words(options: dict) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture
def run_calibrate(pair_folders, tiny_base, checkpoints, tmp_path):
    def run(**options) -> Calibration:
        options = {
            "checkpoint": checkpoints["stage2"], "pretrained_model_name_or_path": tiny_base, "num_inference_steps": 2,
            "sar_dir": pair_folders / "train" / "sar", "eo_dir": pair_folders / "train" / "eo", "device": "cpu",
            "output": tmp_path / "c.json", "batch_size": 4, **options,
        }  # fmt: skip
        assert calibrate.main(words(options)) == 0
        return options["output"]

    return run


def translate(pair_folders, tiny_base, checkpoint, out: Path, *more, **options) -> Path:
    options = {
        "checkpoint": checkpoint, "pretrained_model_name_or_path": tiny_base, "num_inference_steps": 2, "device": "cpu",
        "sar_dir": pair_folders / "test" / "sar", "output_dir": out / "eo", "batch_size": 4, **options,
    }  # fmt: skip
    assert translation.main([*words(options), *more]) == 0
    return out


def read_map(path: Path) -> np.ndarray:
    with rasterio.open(path) as source:
        assert source.dtypes == ("float32",)
        return source.read(1)


def test_from_calibration_to_expected_errors_and_overlays(
    run_calibrate, pair_folders, tiny_base, checkpoints, tmp_path, capsys
):
    path = run_calibrate(ensemble=2, ensemble_output="mean")
    printed = capsys.readouterr().out
    assert "ENCE" in printed and "| 90% |" in printed and f"Calibration: {path}" in printed
    settings = {**SETTINGS, "ensemble": 2, "ensemble_output": "mean"}
    fitted = calibration.load(path, settings)
    assert fitted.report["images"] == {"fit": 6, "intervals": 3, "held_out": 3}
    assert fitted.report["pixels"]["held_out"] == 3 * 40 * 40

    out = tmp_path / "out"
    folders = {f"{name}_dir": out / name for name in ("conf", "variance", "spread", "error", "overlay")}
    options = {**folders, "ensemble": 2, "ensemble_output": "mean", "calibration": path, "overlay_threshold": 30}
    translate(pair_folders, tiny_base, checkpoints["stage2"], out, **options)
    for stem in map(str, range(5)):
        maps = {name: read_map(out / name / f"{stem}.tif") for name in ("variance", "spread")}
        expected = fitted.expected_error(maps)
        assert np.allclose(read_map(out / "error" / f"{stem}.tif"), expected, rtol=1e-5)
        assert np.array_equal(np.array(Image.open(out / "error" / f"{stem}.png")), error_view(expected))
        eo = np.array(Image.open(out / "eo" / f"{stem}.png"))
        assert np.array_equal(np.array(Image.open(out / "overlay" / f"{stem}.png")), overlay(eo, expected, 30))
    (out / "error" / "3.png").unlink()
    (out / "overlay" / "4.png").unlink()
    translate(pair_folders, tiny_base, checkpoints["stage2"], out, "--skip-existing", **options)
    assert "3 of 5 images are there already" in capsys.readouterr().out and (out / "overlay" / "4.png").is_file()


def test_the_calibration_fits_what_test_py_writes(run_calibrate, pair_folders, tiny_base, checkpoints, tmp_path):
    """The mean error of the held-out images and the curve, from the files that a plain translation leaves."""
    fitted = calibration.load(run_calibrate(), SETTINGS)
    out = translate(
        pair_folders, tiny_base, checkpoints["stage2"], tmp_path / "plain", sar_dir=pair_folders / "train" / "sar",
        variance_dir=tmp_path / "plain" / "variance",
    )  # fmt: skip
    order = [str(index) for index in range(12)]  # counting order

    def stacked(indices):
        pairs = [(order[i], pair_folders / "train" / "eo" / f"{order[i]}.png") for i in indices]
        error = [np.array(Image.open(out / "eo" / f"{s}.png")).astype(float) - np.array(Image.open(eo)) for s, eo in pairs]
        return np.stack([read_map(out / "variance" / f"{s}.tif") for s, _ in pairs]), np.abs(error).mean(-1)

    parts = calibrate.split(12, 0)
    _, error = stacked(parts["held_out"])
    assert fitted.report["mean_error"] == pytest.approx(error.mean(), rel=1e-6)
    values, error = stacked(parts["fit"])
    plain = calibration.fit_curve(values.ravel().astype(float), error.ravel())
    apart = np.abs(fitted.curves["variance"](values) / plain(values) - 1)  # equal σ² fall into bins in the order drawn
    assert apart.max() < 0.05 and apart.mean() < 0.005


def test_calibration_is_repeatable_in_any_batching_and_on_a_list(run_calibrate, pair_folders, tmp_path):
    first = run_calibrate(output=tmp_path / "a.json").read_bytes()
    assert run_calibrate(output=tmp_path / "b.json").read_bytes() == first
    values = [
        json.loads(run_calibrate(output=tmp_path / name, batch_size=size).read_text()) for name, size in (("c", 1), ("d", 7))
    ]
    assert values[0]["report"]["mean_error"] == pytest.approx(values[1]["report"]["mean_error"], abs=0.05)
    assert values[0]["model"] == values[1]["model"]
    (tmp_path / "list.txt").write_text("3.png\n\n11.png\r\n1\n7.tif\n5\n")
    chosen = json.loads(run_calibrate(list=tmp_path / "list.txt").read_text())
    assert chosen["report"]["images"] == {"fit": 3, "intervals": 1, "held_out": 1}


def test_eo_of_a_declared_range_calibrates_as_the_same_in_8_bit(run_calibrate, calibrated_once, pair_folders, tmp_path):
    (tmp_path / "eo").mkdir()
    for path in (pair_folders / "train" / "eo").iterdir():
        np.save(tmp_path / "eo" / f"{path.stem}.npy", np.array(Image.open(path)) / np.float32(127.5) - 1)
    found = json.loads(run_calibrate(eo_dir=tmp_path / "eo", eo_range="-1,1").read_text())
    expected = json.loads(calibrated_once)
    assert found["quantiles"] == pytest.approx(expected["quantiles"], rel=1e-4) and found["report"]["counted"] == 1
    np.testing.assert_allclose(found["curves"]["variance"]["y"], expected["curves"]["variance"]["y"], rtol=1e-4)


def test_a_stage_1_checkpoint_is_calibrated_by_its_spread(run_calibrate, checkpoints):
    path = run_calibrate(checkpoint=checkpoints["stage1"], ensemble=2)
    assert list(json.loads(path.read_text())["curves"]) == ["spread"]
    with pytest.raises(UserError, match="without --ensemble: .* stage 1 checkpoint"):
        run_calibrate(checkpoint=checkpoints["stage1"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"error_dir": "e"}, "--error-dir: there is no calibration .*calibration.json: make one with calibrate.py"),
        ({"error_dir": "e", "calibration": "missing.json"}, "--calibration: there is no calibration .*missing.json"),
        ({"error_dir": "e", "calibration": "c.json", "readout": "early"}, "--calibration: .*made with readout midpoint.*early"),
        ({"error_dir": "e", "calibration": "c.json", "ensemble": 3}, "--calibration: .*ensemble 1.*ensemble 3"),
        ({"error_dir": "e", "calibration": "c.json", "num_inference_steps": 3}, "--calibration: .*num_inference_steps 2"),
        ({"error_dir": "e", "calibration": "c.json", "scheduler": "unipc"}, "--calibration: .*scheduler ddim.*unipc"),
        ({"error_dir": "e", "calibration": "c.json", "timestep_spacing": "trailing"}, "--calibration: .*leading.*trailing"),
        ({"error_dir": "e", "calibration": "c.json", "checkpoint": "other"}, "--calibration: .*made for another checkpoint"),
        ({"error_dir": "e", "calibration": "c.json", "prompt": "fog"}, "--calibration: .*made for another .*prompt"),
        ({"overlay_dir": "o"}, "--overlay-dir and --overlay-threshold, .* need each other"),
        ({"overlay_threshold": 3}, "--overlay-dir and --overlay-threshold, .* need each other"),
        ({"overlay_dir": "o", "overlay_threshold": "nan"}, "--overlay-threshold: expected 0 to 255, .* found nan"),
        ({"overlay_dir": "o", "overlay_threshold": 3}, "--overlay-dir: there is no calibration"),
        ({"calibration": "c.json"}, "--calibration: it serves --error-dir and --overlay-dir, found neither"),
        ({"ensemble": 0}, "--ensemble: expected at least 1, found 0"),
        ({"spread_dir": "s"}, "--spread-dir: a spread takes --ensemble of at least 2, found 1"),
        (
            {"spread_dir": "out/../out", "ensemble": 2},
            "--output-dir: .*out is --spread-dir|--spread-dir: .*out is --output-dir",
        ),
        ({"error_dir": "sar/e"}, "--error-dir: .*lies in --sar-dir"),
    ],
    ids=str,
)
def test_wrong_options_of_test_py(
    pair_folders, tiny_base, checkpoints, tmp_path, monkeypatch, capsys, calibrated_once, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sar").symlink_to(pair_folders / "test" / "sar")
    (tmp_path / "c.json").write_bytes(calibrated_once)
    options = {
        "checkpoint": "stage2", "pretrained_model_name_or_path": tiny_base, "num_inference_steps": 2, "device": "cpu",
        "sar_dir": "sar", "output_dir": "out", **options,
    }  # fmt: skip
    options["checkpoint"] = checkpoints[options["checkpoint"]]
    assert errors.run(translation.main, words(options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: ({message})", line), line
    assert {path.name for path in tmp_path.iterdir()} == {"sar", "c.json"}


@pytest.fixture(scope="module")
def calibrated_once(pair_folders, tiny_base, checkpoints, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("calibrated") / "c.json"
    pairs = {"sar_dir": pair_folders / "train" / "sar", "eo_dir": pair_folders / "train" / "eo"}
    options = {"checkpoint": checkpoints["stage2"], "pretrained_model_name_or_path": tiny_base, "device": "cpu", "output": path}
    assert calibrate.main(words({**options, **pairs, "num_inference_steps": 2, "batch_size": 4})) == 0
    return path.read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sar_dir": "missing"}, "--sar-dir: there is no folder missing"),
        ({"eo_dir": "missing"}, "--eo-dir: there is no folder missing"),
        ({"eo_dir": "test/eo"}, "7 images of .* have no twin"),
        ({"output": "train"}, "--output: train is a folder"),
        ({"output": "short.txt/c.json"}, "--output: cannot write into short.txt: Not a directory"),
        ({"output": "short.txt/new/c.json"}, "--output: cannot write into short.txt/new: Not a directory"),
        ({"eo_range": "0,1"}, "train/eo/0.png: 8-bit pixels, .*; leave out --eo-range"),
        ({"list": "missing.txt"}, "missing.txt: cannot read the list"),
        ({"list": "wrong.txt"}, "--list: wrong.txt, line 2: there is no pair '99'"),
        ({"list": "short.txt"}, "--sar-dir, --eo-dir: expected at least 4 pairs .*, found 3"),
        ({"ensemble": 0}, "--ensemble: expected at least 1, found 0"),
        ({"split_seed": -1}, "--split-seed: expected at least 0, found -1"),
        ({"checkpoint": "missing"}, "--checkpoint: there is no missing"),
    ],
    ids=str,
)
def test_wrong_options_of_calibrate_py(pair_folders, tiny_base, checkpoints, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(pair_folders / split)
    (tmp_path / "wrong.txt").write_text("1\n99.png\n")
    (tmp_path / "short.txt").write_text("1\n2\n3\n")
    options = {
        "checkpoint": checkpoints["stage2"], "pretrained_model_name_or_path": tiny_base, "num_inference_steps": 1,
        "sar_dir": "train/sar", "eo_dir": "train/eo", "device": "cpu", "output": "c.json", **options,
    }  # fmt: skip
    assert errors.run(calibrate.main, words(options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line), line
    assert not (tmp_path / "c.json").exists()


def test_pairs_that_are_unreadable_or_of_two_sizes_are_named_and_left_out(
    pair_folders, checkpoints, tiny_base, tmp_path, capsys
):
    for kind in ("sar", "eo"):
        (tmp_path / kind).mkdir()
        for index in range(9):
            Image.open(pair_folders / "train" / kind / f"{index}.png").save(tmp_path / kind / f"{index}.png")
    (tmp_path / "eo" / "2.png").write_bytes(b"")
    options = {"sar_dir": tmp_path / "sar", "eo_dir": tmp_path / "eo", "device": "cpu", "output": tmp_path / "c.json"}
    options |= {"checkpoint": checkpoints["stage2"], "pretrained_model_name_or_path": tiny_base, "num_inference_steps": 1}
    assert calibrate.main(words(options)) == 1
    assert f"1 of 9 pairs skipped for the reasons above: {tmp_path / 'eo' / '2.png'}" in capsys.readouterr().err
    assert sum(json.loads((tmp_path / "c.json").read_text())["report"]["images"].values()) == 8
    Image.new("RGB", (40, 39)).save(tmp_path / "eo" / "4.png")
    assert calibrate.main(words(options)) == 1
    assert re.search("differ in size: SAR .*4.png is 40 x 40 px, EO .*4.png is 40 x 39 px", capsys.readouterr().err)
    assert sum(json.loads((tmp_path / "c.json").read_text())["report"]["images"].values()) == 7
    for index in range(9):
        (tmp_path / "eo" / f"{index}.png").write_bytes(b"")
    with pytest.raises(UserError, match="no pair is left for the part 'fit'"):
        calibrate.main(words(options))


@pytest.mark.parametrize("script", ["calibrate.py", "test.py"])
def test_help_imports_no_networks(script):
    code = f"import runpy, sys; sys.argv = [{script!r}, '--help']; runpy.run_path({script!r}, run_name='__main__')"
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and all(f"--{name} " in done.stdout for name in ("readout", "ensemble", "ensemble-output"))
    assert "cdiffset.inference.options" in done.stderr and "diffusers" not in done.stderr
