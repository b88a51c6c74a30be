"""Translate in a browser: python app.py --checkpoint work_dir/demo/stage2/best

The page does what test.py does, with the same files as a result, and shows the command line that repeats it. It listens on this
machine alone unless --host says otherwise. Everything a visitor uploads or makes is deleted when the visitor leaves.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import rasterio
from PIL import Image

import test
from cdiffset.calibration import calibration
from cdiffset.calibration.error_pictures import ERROR_VIEW_MAX, error_view, overlay, variance_view
from cdiffset.errors import Parser, Skipped, Stopped, UserError, message_of, run
from cdiffset.images import IMAGE_SUFFIXES, read_sar, without_georeference, write_png
from cdiffset.inference.options import (
    PRESETS,
    add_machine_options,
    add_model_options,
    calibrated_settings,
    machine_settings,
    model_settings,
    sampling_settings,
)
from cdiffset.scenes.geotiff import find_sources, open_scene, quicklook
from cdiffset.scenes.radiometry import SCALES, wanted_polarisations
from cdiffset.scenes.slider_page import sar_view, slider, written_radiometry

ROOT = Path(__file__).resolve().parent
EXAMPLES = ROOT / "data/sentinel_demo/test/sar"
EXAMPLE_COUNT = 5
AS_TRAINED = "as the checkpoint's training images"
CALIBRATED = "calibrated"
PAGE_OPTIONS = ("host", "port", "calibration")  # what does not go to every call of test.py
CSS = ".gradio-container { max-width: 80rem !important; }"
PLAIN = {"show_label": False, "buttons": [], "interactive": False}  # nothing lies over the picture
DOWNLOADS = {  # label: (folder, suffix)
    "Download EO": ("eo", "*"), "σ²": ("variance", "tif"), "expected error": ("error", "tif"), "all files": (".", "zip"),
}  # fmt: skip
UPLOAD = "SAR: an image, a GeoTIFF, or a scene's polarisations"
ALT = {
    "variance": "Map of the variance σ², dark where the network is sure, light where it is not",
    "error": "Map of the expected error in grey levels of 255, dark where it is small, light where it is large",
    "overlay": "The EO image, hatched where the expected error is above the threshold",
}
ABOUT = """# SAR to EO, and where not to trust it
A translation is a guess by a network that has seen other places. *σ²* is its own doubt; the *expected error* is calibrated on
known pairs, in grey levels of 255. Released weights, e.g. `--checkpoint qxs-saropt`: see the README."""
FAR = "**Far from the training images**: {}"
NO_CALIBRATION = """No expected error: there is no calibration for these settings. `calibrate.py` makes one from pairs whose EO
is known; until then σ² ranks the pixels, but not in grey levels."""

NO_VARIANCE = "A checkpoint of stage 1 has no σ² and no expected error."


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="A web page that translates SAR images.", allow_abbrev=False)
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: for the whole network [127.0.0.1]")
    group.add_argument("--port", type=int, help="[the first free one from 7860]")
    group.add_argument("--calibration", type=Path, help="JSON file of calibrate.py [the one beside the checkpoint]")
    add_model_options(parser)
    add_machine_options(parser)
    parser.set_defaults(batch_size="auto")
    return parser


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are deleted then as well
    args, theirs = make_parser().parse_args(argv), test.make_parser()
    given = {
        name: value for name, value in vars(args).items() if name not in PAGE_OPTIONS and value != theirs.get_default(name)
    }
    given["batch_size"] = args.batch_size or "auto"
    with tempfile.TemporaryDirectory(prefix="cdiffset-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")  # read when gradio is imported
        try:
            import gradio
        except ImportError as error:
            raise UserError(f"the page needs gradio: pip install -r requirements-extra.txt ({error})") from error

        work = Work(given, args.calibration, Path(folder))
        gradio.set_static_paths([work.folder])  # served from where they are, not copied
        page = make_page(work).queue(default_concurrency_limit=1)
        where = {"server_name": args.host, "server_port": args.port}
        try:
            _, url, _ = page.launch(**where, share=False, css=CSS, footer_links=[], quiet=True, prevent_thread_lock=True)
        except (OSError, ValueError) as error:  # no such address, or a port that is taken
            raise UserError(f"--host, --port: cannot listen on {args.host}, port {args.port or 'any'}: {error}") from error
        print(f"Open {url} in a browser; Ctrl-C ends the page", flush=True)
        page.block_thread()
    return 0


# -------------------------------------------------------------------------------------------------------------- the work
@dataclass(eq=False)
class Visit:
    """What belongs to one visitor of the page."""

    folder: Path
    uploads: set[Path] = field(default_factory=set)
    stop: Event = field(default_factory=Event)
    runs: int = 0
    result: "Result | None" = None  # of the last one


class Choices(NamedTuple):
    """What a visitor decides."""

    sampling: str  # a key of Work.samplings
    seed: int
    bands: str
    scale: str  # of SCALES, auto or AS_TRAINED


class Result(NamedTuple):
    """What a translation has left in its folder."""

    folder: Path
    command: list[str]  # repeats it
    sar: np.ndarray  # uint8 [h, w, 3 or 4], as the network saw it; this and the others at most QUICKLOOK_PX a side
    eo: np.ndarray  # uint8 [h, w, 3 or 4]
    variance: np.ndarray | None  # float32 [h, w], NaN where there are no data
    expected: np.ndarray | None
    warnings: str | None  # what of a scene is far from the training images

    @property
    def downloads(self) -> list[str | None]:
        """One for each of DOWNLOADS."""
        main = [next(iter(sorted(self.folder.glob(f"{kind}/[!.]*.{suffix}"))), None) for kind, suffix in DOWNLOADS.values()]
        return [path and str(path) for path in main]

    def picture(self, name: str, pixels: np.ndarray) -> str:
        """A picture as a file beside the results, each under a name of its own."""
        path = self.folder / "views" / f"{name}-{uuid4().hex}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(path, pixels)
        return str(path)


class Work:
    """The checkpoint, loaded once, and what it is asked to do."""

    def __init__(self, given: dict, calibration_file: Path | None, folder: Path):
        """given: options of test.py that hold for all translations, by name."""
        from cdiffset.inference.translator import load_checkpoint

        self.given, self.folder, self.visits = given, folder / "visits", {}
        self.folder.mkdir(parents=True)
        args = self.parse(Path(), {})
        model, machine = model_settings(args), machine_settings(args)
        self.checkpoint = load_checkpoint(model, machine, with_fingerprint=True)
        unet, vae = self.checkpoint.unet.config, self.checkpoint.vae.config
        self.has_variance = unet.out_channels > vae.latent_channels
        self.calibration = {"calibration": calibration_file} if calibration_file else {}
        self.calibrated = self.calibrated_settings(calibration_file or calibration.path_beside(model.checkpoint))
        self.samplings = {name: {"preset": name} for name in PRESETS}
        if self.calibrated and not any(self.is_calibrated(each) for each in self.samplings.values()):
            own = {
                name: value
                for name, value in self.calibrated.items()
                if self.calibrated["ensemble"] > 1 or "ensemble" not in name
            }
            self.samplings = {CALIBRATED: own} | self.samplings

    def calibrated_settings(self, path: Path) -> dict | None:
        """What a calibration holds for; None where there is none and none is asked for."""
        if not (self.calibration or path.is_file()):
            return None
        found = calibration.load(path)
        if found.model != self.checkpoint.fingerprint:
            raise UserError(f"{path} was made for another checkpoint, base model or prompt: calibrate anew, or remove it")
        return found.settings

    def parse(self, folder: Path, options: dict) -> argparse.Namespace:
        """The options of test.py that translate what is in a folder."""
        return test.make_parser().parse_args(self.words(folder / "sar", folder, options))

    def words(self, sar: Path, folder: Path, options: dict) -> list[str]:
        """test.py's command line."""
        named = {"sar_dir": sar, "output_dir": folder / "eo", **self.given, **options}
        pairs = {f"--{name.replace('_', '-')}": value for name, value in named.items()}
        return [word for name, value in pairs.items() for word in ([name] if value is True else [name, str(value)])]

    def is_calibrated(self, sampling: dict) -> bool:
        return calibrated_settings(sampling_settings(self.parse(Path(), sampling))) == self.calibrated

    def label_of(self, name: str) -> str:
        """What the page says of a sampling."""
        settings = sampling_settings(self.parse(Path(), self.samplings[name]))
        several = f", {settings.ensemble_output} of {settings.ensemble} samples" if settings.ensemble > 1 else ""
        has_error = ", with the expected error" if self.is_calibrated(self.samplings[name]) else ""
        return f"{name}: {settings.num_inference_steps} steps{several}{has_error}"

    def visit(self, key: str) -> Visit:
        if key not in self.visits:
            self.visits[key] = Visit(Path(tempfile.mkdtemp(dir=self.folder)))
        return self.visits[key]

    def forget(self, key: str) -> None:
        """Delete what belongs to a visitor, but for uploads of the same content that another one has."""
        if visit := self.visits.pop(key, None):
            visit.stop.set()
            shutil.rmtree(visit.folder, ignore_errors=True)
            for path in visit.uploads.difference(*(other.uploads for other in self.visits.values())):
                shutil.rmtree(path.parent, ignore_errors=True)  # each upload lies in a folder of its own

    def translate(self, visit: Visit, uploads: list[Path], choices: Choices, on_progress) -> Result:
        """=> the result, in place of the visitor's last one. UserError and Stopped as the command line has them."""
        visit.stop.clear()
        visit.runs += 1
        folder = visit.folder / str(visit.runs)
        try:
            result = self.translate_into(folder, visit.stop, uploads, choices, on_progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if visit not in self.visits.values():  # who has left meanwhile
                shutil.rmtree(visit.folder, ignore_errors=True)
        if visit.result:
            shutil.rmtree(visit.result.folder, ignore_errors=True)
        visit.result = result
        return result

    def translate_into(self, folder: Path, stop: Event, uploads: list[Path], choices: Choices, on_progress) -> Result:
        (folder / "sar").mkdir(parents=True)
        for path in uploads:
            if path.suffix.lower() not in IMAGE_SUFFIXES:  # neither a VRT nor what GDAL reads beside a raster
                raise UserError(f"{path.name}: expected one of {' '.join(IMAGE_SUFFIXES)}")
            shutil.copy(path, folder / "sar" / path.name)
        options = self.options_of(choices)
        if len(found := find_sources(folder / "sar", wanted_polarisations(options.get("bands")))) > 1:
            raise UserError(f"expected one image, or one scene's polarisations, found {len(found)}: remove the others")
        sampling = self.samplings[choices.sampling]
        maps = {"variance_dir": folder / "variance"} if self.has_variance else {}
        maps |= {"error_dir": folder / "error", **self.calibration} if self.is_calibrated(sampling) else {}

        def step(done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped("the translation")
            on_progress(done, total)

        skipped: Skipped = test.translate(self.parse(folder, options | maps), lambda *_: self.checkpoint, step)
        if skipped:
            raise UserError(next(iter(skipped.values())))
        shown = {name: path if name == "calibration" else Path("out", path.name) for name, path in maps.items()}
        (name, relative), *_ = found.items()
        source = relative[0]  # of which the other polarisations are looked for beside it
        command = ["python", "test.py", *self.words(source, Path("out"), options | shown)]
        return read_result(folder, name, [folder / "sar" / file for file in relative], command)

    def options_of(self, choices: Choices) -> dict:
        given = {"bands": choices.bands.strip(), "scale": "" if choices.scale == AS_TRAINED else choices.scale}
        options = {name: value for name, value in given.items() if value}
        return self.samplings[choices.sampling] | {"seed": choices.seed} | options


def read_result(folder: Path, name: Path, sar: list[Path], command: list[str]) -> Result:
    """The pictures and maps that a translation wrote, small enough to be shown."""
    eo = next(path for suffix in (".png", ".tif") if (path := folder / "eo" / name.with_suffix(suffix)).is_file())
    picture = quicklook(eo)
    maps = [folder / kind / f"{eo.stem}.tif" for kind in ("variance", "error")]
    values = [quicklook(path)[..., -1] if path.is_file() else None for path in maps]
    with zipfile.ZipFile(folder / f"{name.stem}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.glob("*/[!.]*")):
            if path.parent.name != "sar":
                archive.write(path, path.relative_to(folder))
    with without_georeference(), rasterio.open(eo) as source:
        warnings = source.tags().get("CDIFFSET_OUT_OF_DOMAIN")
    return Result(folder, command, sar_picture(sar, eo, picture.shape[:2]), picture, *values, warnings)


def sar_picture(sar: list[Path], eo: Path, size: tuple[int, int]) -> np.ndarray:
    """The SAR as the network saw it, at this size (height, width) => uint8 [h, w, 3 or 4]."""
    if eo.suffix == ".png":
        return np.array(Image.fromarray(read_sar(sar[0]).round().astype(np.uint8)).resize(size[::-1]))
    with open_scene(sar) as scene:
        return sar_view(scene, written_radiometry(eo), size)


# -------------------------------------------------------------------------------------------------------------- the page
def make_page(work: Work):
    """The page as gradio.Blocks."""
    import gradio as gr

    with gr.Blocks(title="C-DiffSET", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                inputs = add_inputs(work)
            with gr.Column(scale=3, min_width=300):
                results = add_results(work)
        connect(work, page, inputs, results)
    return page


def add_inputs(work: Work) -> SimpleNamespace:
    """What a visitor gives and decides."""
    import gradio as gr

    uploads = gr.File(label=UPLOAD, file_count="multiple", file_types=list(IMAGE_SUFFIXES))
    examples = sorted(EXAMPLES.glob("*.webp"))
    chosen = examples[:: max(1, len(examples) // EXAMPLE_COUNT)][:EXAMPLE_COUNT]
    gr.Examples([[[str(path)]] for path in chosen], [uploads], label="Sentinel-1 tiles", api_visibility="private")
    choices = [(work.label_of(name), name) for name in work.samplings]
    sampling = gr.Radio(choices, value=choices[0][1], label="Sampling")
    seed = gr.Number(work.given.get("seed", 0), label="Seed", precision=0, minimum=0)
    with gr.Accordion("How a scene is read", open=False):
        bands = gr.Textbox("", label="Bands", placeholder="by number or name, e.g. VV,VH")
        scale = gr.Dropdown([AS_TRAINED, "auto", *SCALES], value=AS_TRAINED, label="What the numbers are")
    with gr.Row():
        start, stop = gr.Button("Translate", variant="primary"), gr.Button("Stop", variant="stop")
    return SimpleNamespace(uploads=uploads, choices=[sampling, seed, bands, scale], start=start, stop=stop)


def add_results(work: Work) -> SimpleNamespace:
    """What a visitor sees of a translation; hidden until there is one."""
    import gradio as gr

    compared = gr.HTML(min_height=200)
    warnings = gr.Markdown(visible=False)
    with gr.Column(visible=False) as everything:
        with gr.Row():
            with gr.Column(min_width=280, visible=work.has_variance):
                gr.Markdown("**σ²**: the network's own doubt")
                variance = gr.Image(alt_text=ALT["variance"], **PLAIN)
            with gr.Column(min_width=280) as with_error:
                gr.Markdown("**Expected error**, in grey levels of 255")
                error = gr.Image(alt_text=ALT["error"], **PLAIN)
        missing = gr.Markdown(NO_CALIBRATION if work.has_variance else NO_VARIANCE)
        with gr.Column() as with_hatching:
            threshold = gr.Slider(0, ERROR_VIEW_MAX, 25, step=1, label="Hatch where the expected error is above")
            hatched = gr.Image(alt_text=ALT["overlay"], **PLAIN)
        with gr.Row():
            downloads = [gr.DownloadButton(label) for label in DOWNLOADS]
        command = gr.Textbox(label="The same on the command line", elem_id="command", lines=3, interactive=True)
    shown = [compared, warnings, everything, with_error, missing, with_hatching, variance, error, *downloads]
    return SimpleNamespace(shown=shown, hatching=[hatched, command], threshold=threshold)  # in the order of show and hatch


def show(result: Result) -> list:
    """What is to be shown of a result."""
    import gradio as gr

    with_error = result.expected is not None
    variance = None if result.variance is None else result.picture("variance", variance_view(result.variance))
    error = result.picture("error", error_view(result.expected)) if with_error else None
    visible = [True, with_error, not with_error, with_error]  # everything, with_error, missing, with_hatching
    return [
        slider(result.sar, result.eo), gr.Markdown(FAR.format(result.warnings), visible=bool(result.warnings)),
        *(gr.update(visible=each) for each in visible), variance, error,
        *(gr.DownloadButton(value=file, visible=file is not None) for file in result.downloads),
    ]  # fmt: skip


def hatch(result: Result, threshold: float) -> list:
    """The overlay of a result at a threshold, and the command line that repeats both."""
    if result.expected is None:
        return [None, shlex.join(result.command)]
    picture = overlay(result.eo[..., :3], result.expected, threshold)
    options = ["--overlay-dir", "out/overlay", "--overlay-threshold", f"{threshold:g}"]
    return [result.picture("overlay", picture), shlex.join([*result.command, *options])]


def connect(work: Work, page, inputs: SimpleNamespace, results: SimpleNamespace) -> None:
    """Have the page do what its buttons say."""
    import gradio as gr

    bar, outputs = gr.Progress(), [*results.shown, *results.hatching]

    def translate(uploads, sampling, seed, bands, scale, threshold, request: gr.Request, progress=bar):
        if not uploads:
            raise gr.Error("expected a SAR image, found none: drop one, or choose an example", print_exception=False)
        progress(0, "reading")
        try:
            result = work.translate(
                work.visit(request.session_hash),
                [Path(path) for path in uploads],
                Choices(sampling, seed, bands, scale),
                lambda done, total: progress((done, total), "translating", unit="steps"),
            )
        except UserError as error:
            where = rf"{re.escape(str(work.folder))}\S*?/sar/"  # which is no visitor's business
            raise gr.Error(re.sub(where, "", message_of(error)), duration=None, print_exception=False) from None
        except Stopped:
            return [gr.skip()] * len(outputs)
        return show(result) + hatch(result, threshold)

    def change_threshold(threshold: float, request: gr.Request):
        result = work.visit(request.session_hash).result
        return hatch(result, threshold) if result else [gr.skip()] * len(results.hatching)

    def keep_in_mind(uploads, request: gr.Request) -> None:
        work.visit(request.session_hash).uploads |= {Path(path) for path in uploads or ()}

    def stop(request: gr.Request) -> None:
        work.visit(request.session_hash).stop.set()
        gr.Info("stopped")

    def leave(request: gr.Request) -> None:
        work.forget(request.session_hash)

    private = {"api_visibility": "private"}
    at_once = {"concurrency_limit": None, "show_progress": "hidden", **private}  # while a translation runs
    threshold = results.threshold
    running = inputs.start.click(translate, [inputs.uploads, *inputs.choices, threshold], outputs, **private)
    inputs.stop.click(stop, cancels=[running], **at_once)
    threshold.change(change_threshold, [threshold], results.hatching, trigger_mode="always_last", **at_once)
    inputs.uploads.change(keep_in_mind, [inputs.uploads], **at_once)
    page.unload(leave)


if __name__ == "__main__":
    sys.exit(run(main))
