"""The web page, in a real browser: a visitor uploads, translates, looks, downloads what test.py writes, and leaves nothing."""

import shlex
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from files import save_image, save_raster
from rasterio.transform import Affine
from test_export import checkpoint  # noqa: F401

import app
import test as test_py
from cdiffset import errors

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
MAX_PIXELS = 90_000
WAIT_MS = 60_000
RNG = np.random.default_rng(0)


# --------------------------------------------------------------------------------------------------------------- server
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):  # noqa: F811
    """=> (address, folder that it keeps its files in, command line of the checkpoint)."""
    temporary, port = tmp_path_factory.mktemp("server"), free_port()
    options = ["--checkpoint", str(checkpoint), "--max-pixels", str(MAX_PIXELS)]
    command = [sys.executable, REPO / "app.py", *options, "--port", str(port)]
    with (temporary / "log").open("w") as log:
        process = subprocess.Popen(command, env={**environment(), "TMPDIR": str(temporary)}, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or is_open(port), 120)
        assert process.poll() is None, (temporary / "log").read_text()
        yield f"http://127.0.0.1:{port}/", temporary
        assert "Traceback" not in (temporary / "log").read_text()
    finally:
        process.terminate()
        process.wait(30)
    assert not list(temporary.glob("cdiffset-*"))  # uploads and all


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(is_so, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not is_so() and time.monotonic() < until:
        time.sleep(0.1)
    assert is_so()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A visit; everything that it asks for is on this machine, and nothing is left when it ends."""
    address, temporary = server
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, asked = context.new_page(), []
    page.set_default_timeout(WAIT_MS)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Translate").wait_for()
    yield page
    context.close()
    assert all(url.startswith((address, address.replace("http", "ws"), "data:", "blob:")) for url in asked), asked
    wait_for(lambda: not list(temporary.glob("cdiffset-*/visits/*")), 60)


def upload(page, *files: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(files)
    for file in files:
        page.get_by_text(file.suffix).last.wait_for()


def translate(page, *files: Path) -> None:
    upload(page, *files)
    page.get_by_role("button", name="Translate").click()
    page.locator(".swipe").wait_for()
    page.locator("#command textarea").wait_for()


def choose(page, label: str) -> None:
    page.get_by_role("radio", name=label).check()


def downloaded(page, label: str, tmp_path: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=label, exact=True).or_(page.get_by_role("link", name=label, exact=True)).first.click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


def repeated(page, sar_dir: Path, output: Path) -> dict[str, bytes]:
    """What the command line that the page shows writes, run beside the SAR => {path: content}."""
    words = shlex.split(page.locator("#command textarea").input_value())
    assert words[:2] == ["python", "test.py"]
    place = {"--sar-dir": sar_dir} | dict.fromkeys(("--output-dir", "--variance-dir", "--error-dir", "--overlay-dir"), output)
    argv = [str(place[words[index - 1]] / word) if words[index - 1] in place else word for index, word in enumerate(words)]
    assert test_py.main(argv[2:]) == 0
    return {path.relative_to(output / "out").as_posix(): path.read_bytes() for path in (output / "out").glob("*/[!.]*")}


# ---------------------------------------------------------------------------------------------------------------- visits
@needs_browser
def test_a_visitor_gets_what_the_command_line_writes(page, tmp_path):
    sar = save_image(tmp_path / "sar/a b.png", RNG.integers(0, 256, (40, 56), dtype=np.uint8))
    translate(page, sar)

    with zipfile.ZipFile(downloaded(page, "all files", tmp_path)) as archive:
        got = {name: archive.read(name) for name in archive.namelist()}
    wanted = repeated(page, tmp_path / "sar", tmp_path)
    assert {path.split("/")[0] for path in wanted} == {"eo", "variance", "error", "overlay"}
    assert got == {name: content for name, content in wanted.items() if not name.startswith("overlay/")}
    assert downloaded(page, "Download EO", tmp_path).read_bytes() == wanted["eo/a b.png"]
    assert downloaded(page, "σ²", tmp_path).read_bytes() == wanted["variance/a b.tif"]


@needs_browser
def test_the_slider_and_the_threshold_take_the_keyboard(page, tmp_path):
    translate(page, save_image(tmp_path / "a.png", RNG.integers(0, 256, (40, 40), dtype=np.uint8)))
    slider = page.get_by_label("EO to the left, SAR to the right of it")
    slider.focus()
    slider.press("End")
    assert page.locator(".swipe").evaluate("element => element.style.getPropertyValue('--at')") == "100%"
    for alt in ("SAR", "EO, translated", *app.ALT.values()):
        assert page.get_by_alt_text(alt, exact=True).is_visible()

    hatched = page.get_by_alt_text(app.ALT["overlay"])
    before = hatched.get_attribute("src")
    threshold = page.locator("input[type=range][max='64']")
    threshold.focus()
    threshold.press("ArrowRight")
    page.wait_for_function("before => ![...document.images].some(image => image.src === before)", arg=before)
    command = page.locator("#command textarea").input_value()
    assert command.endswith(f"--overlay-threshold {threshold.input_value()}")


@needs_browser
def test_a_scene_comes_back_on_its_own_grid(page, tmp_path):
    band = RNG.integers(1, 5000, (60, 44), dtype=np.uint16)
    band[:20, :20] = 0
    grid = {"crs": "EPSG:32631", "transform": Affine(10, 0, 5e5, 0, -10, 5e6), "nodata": 0}
    (tmp_path / "sar").mkdir()
    translate(page, save_raster(tmp_path / "sar/scene.tif", band, **grid))
    with zipfile.ZipFile(downloaded(page, "all files", tmp_path)) as archive:
        got = {name: archive.read(name) for name in archive.namelist()}
    options = page.locator("#command textarea")
    assert "--overlay-dir" in options.input_value()
    wanted = repeated(page, tmp_path / "sar", tmp_path)
    assert {"eo/scene.tif", "eo/scene.quicklook.png", "error/scene.tif", "error/scene.qml"} <= got.keys()
    for name in ("eo/scene.tif", "variance/scene.tif", "error/scene.tif", "eo/scene.quicklook.png"):
        assert got[name] == wanted[name]
    assert page.get_by_alt_text("SAR", exact=True).is_visible()
    assert page.get_by_text("pixels of uint16, the training images had uint8").is_visible()


@needs_browser
def test_settings_of_the_page_reach_the_translation(page, tmp_path):
    (tmp_path / "sar").mkdir()
    choose(page, "fast: 8 steps")
    page.get_by_label("Seed").fill("7")
    page.get_by_text("How a scene is read").click()
    page.get_by_label("Bands").fill("2")
    page.get_by_label("What the numbers are").click()
    page.get_by_role("option", name="db", exact=True).click()
    bands = RNG.integers(-30, 0, (2, 40, 40)).astype(np.float32)
    translate(page, save_raster(tmp_path / "sar/two.tif", bands))
    for words in ("--preset fast", "--seed 7", "--bands 2", "--scale db"):
        assert words in page.locator("#command textarea").input_value()
    assert page.get_by_text("there is no calibration for these settings").is_visible()  # it was made with others
    assert not page.get_by_alt_text(app.ALT["overlay"]).is_visible()
    with zipfile.ZipFile(downloaded(page, "all files", tmp_path)) as archive:
        assert archive.read("eo/two.tif") == repeated(page, tmp_path / "sar", tmp_path)["eo/two.tif"]


REFUSED = [  # what it is, files by name, words of the message
    ("no image", {"a.png": b"not an image"}, ("a.png: unreadable, truncated or not an image",)),
    ("too many pixels", {"a.png": (301, 300)}, ("300 x 301 px", f"at most {MAX_PIXELS} px")),
    ("two images", {"a.png": (40, 40), "b.png": (40, 40)}, ("expected one image", "found 2")),
    ("nothing", {}, ("expected a SAR image, found none",)),
    ("VRT", {"a.vrt": b"<VRTDataset/>"}, ("Invalid file type", ".tif")),
    ("pickled array", {"a.npy": np.array([{}])}, ("a.npy", "unreadable")),
]


@needs_browser
@pytest.mark.parametrize("files, words", [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_bad_input_gets_one_message_and_the_next_image_works(files, words, page, tmp_path):
    for name, content in files.items():
        if isinstance(content, tuple):
            save_image(tmp_path / name, np.zeros(content, np.uint8))
        elif isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.save(tmp_path / name, content, allow_pickle=True)
    if files:
        upload(page, *(tmp_path / name for name in files))
    page.get_by_role("button", name="Translate").click()
    message = page.get_by_test_id("toast-body")
    message.wait_for()
    said = message.inner_text()
    assert all(word in said for word in words) and "Traceback" not in said and "cdiffset-" not in said, said
    page.reload()
    page.get_by_role("button", name="Translate").wait_for()
    translate(page, save_image(tmp_path / "good.png", np.zeros((40, 40), np.uint8)))


@needs_browser
def test_stop_stops(page, server, tmp_path):
    _, temporary = server
    choose(page, "paper: 50 steps")
    upload(page, save_image(tmp_path / "large.png", RNG.integers(0, 256, (300, 300), dtype=np.uint8)))
    page.get_by_role("button", name="Translate").click()
    page.get_by_text("steps").last.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    page.get_by_label("Clear").click()
    translate(page, save_image(tmp_path / "small.png", np.zeros((40, 40), np.uint8)))
    written = {path.name for path in temporary.glob("cdiffset-*/visits/*/*/eo/*.png")}
    assert written == {"small.png"}


@needs_browser
def test_it_fits_a_phone_and_the_tab_key_reaches_it(browser, server):
    page = browser.new_context(viewport={"width": 360, "height": 780}).new_page()
    page.goto(server[0])
    page.get_by_role("button", name="Translate").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.innerText || document.activeElement.type"))
    assert {"Translate", "Stop", "radio", "number", "file"} <= {each.strip() for each in reached} | {"file"}
    page.context.close()


# --------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    "given, words",
    [
        (["--checkpoint", "nowhere"], ("--checkpoint", "nowhere")),
        (["--port", "x"], ("--port", "invalid int value: 'x'")),
        (["--sar-dir", "x"], ("--sar-dir",)),
    ],
)
def test_what_it_cannot_begin_is_one_line(given, words, checkpoint, capsys):  # noqa: F811
    assert errors.run(app.main, given if "--checkpoint" in given else ["--checkpoint", str(checkpoint), *given]) == 2
    told = capsys.readouterr().err.strip().split("\n")
    assert len(told) == 1 and all(word in told[0] for word in words), told


def test_a_port_that_is_taken_is_one_line(checkpoint, capsys):  # noqa: F811
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert errors.run(app.main, ["--checkpoint", str(checkpoint), "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err.strip().split("\n")[-1]


def test_a_stage_1_checkpoint_translates_without_maps(run, tmp_path):
    folder = run(tmp_path / "run", num_iter=1) / "latest"
    work = app.Work({"checkpoint": str(folder)}, None, tmp_path / "page")
    sar = save_image(tmp_path / "a.png", np.zeros((40, 40), np.uint8))
    result = work.translate(work.visit("x"), [sar], app.Choices("fast", 0, "", app.AS_TRAINED), lambda *_: None)
    assert not work.has_variance and result.variance is None and result.expected is None and result.eo.shape == (40, 40, 3)


def test_two_visitors_of_one_upload_leave_apart(checkpoint, tmp_path):  # noqa: F811
    work = app.Work({"checkpoint": str(checkpoint)}, None, tmp_path / "page")
    upload = save_image(tmp_path / "uploads/hash/a.png", np.zeros((40, 40), np.uint8))
    first, second = work.visit("1"), work.visit("2")
    first.uploads.add(upload)
    second.uploads.add(upload)
    work.forget("1")
    assert upload.is_file() and not first.folder.exists() and first.stop.is_set()
    work.forget("2")
    assert not upload.exists() and not second.folder.exists()
    work.forget("2")  # who has never come


def test_a_result_replaces_the_last_one_and_a_failure_leaves_nothing(checkpoint, tmp_path):  # noqa: F811
    work = app.Work({"checkpoint": str(checkpoint)}, None, tmp_path / "page")
    visit, choices = work.visit("x"), app.Choices("fast", 0, "", app.AS_TRAINED)
    good = save_image(tmp_path / "a.png", np.zeros((40, 40), np.uint8))
    bad = tmp_path / "b.png"
    bad.write_bytes(b"no image")
    first = work.translate(visit, [good], choices, lambda *_: None)
    with pytest.raises(errors.UserError, match="unreadable"):
        work.translate(visit, [bad], choices, lambda *_: None)
    assert visit.result is first and list(visit.folder.iterdir()) == [first.folder]
    second = work.translate(visit, [good], choices, lambda *_: None)
    assert list(visit.folder.iterdir()) == [second.folder]

    def leave(done: int, total: int) -> None:
        work.forget("x")

    with pytest.raises(errors.Stopped):
        work.translate(visit, [good], choices, leave)
    assert not visit.folder.exists()


def test_another_calibration_is_taken_and_one_of_another_model_refused(checkpoint, run, tmp_path):  # noqa: F811
    moved = shutil.copy(checkpoint / "calibration.json", tmp_path / "moved.json")
    work = app.Work({"checkpoint": str(checkpoint)}, moved, tmp_path / "page")
    upload = save_image(tmp_path / "a.png", np.zeros((40, 40), np.uint8))
    result = work.translate(work.visit("x"), [upload], app.Choices("calibrated", 0, "", app.AS_TRAINED), lambda *_: None)
    assert result.expected is not None and shlex.join(result.command).endswith(f"--calibration {moved}")
    other = run(tmp_path / "run", confidence=True, num_iter=1) / "latest"
    with pytest.raises(errors.UserError, match="was made for another checkpoint"):
        app.Work({"checkpoint": str(other)}, moved, tmp_path / "other")
