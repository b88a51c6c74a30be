"""C-DiffSET against what people would use instead, on the demo's real pairs: equal minutes, and equal updates.

    python benchmarks/rivals.py --output work_dir/rivals    # hours on 2 CPU cores; the same command continues

Regression, pix2pix and pixel diffusion are benchmarks/rival_models.py; C-DiffSET and its stage 1 alone are this program
as users run it: main.py with the demo's configurations, test.py. A pilot times every method; `minutes` gives each as many
updates as fit into --minutes on this machine, latents included, `updates` as many as C-DiffSET makes in them. One evaluator for
all, evaluate.py's. Writes RIVALS.md, results.json, figure.png and spectra.png into --output.
"""

import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import MIXED_PRECISION, PRECISION, REPO, machine, table, timed, words, write_json

# isort: split
from matplotlib.figure import Figure

import utils
from benchmarks.discrepancy import check_settings
from benchmarks.discrepancy_report import cell
from benchmarks.rival_models import BASE, METHODS, PAIRS, PARTS, base_hashes
from cdiffset.errors import Parser, UserError, run
from cdiffset.evaluation.evaluate import evaluate_folders, resampled_means
from cdiffset.evaluation.folders import EvaluationFolders
from cdiffset.images import list_images, read_eo, read_sar, to_tensor, write_png, write_text

TITLES = {
    "regression": "regression, L1",
    "pix2pix": "pix2pix",
    "pixel_diffusion": "pixel diffusion",
    "mse": "C-DiffSET, stage 1 alone",
    "cdiffset": "C-DiffSET",
}
OUTPUTS = {"sample": "", "mean": ", mean of 8"}
PILOT = (10, 60)  # updates of two runs, whose times differ by that of the updates between
WARMUP = 50  # the demo's, of both stages
STAGE1 = 350 / 2000  # of C-DiffSET's updates, as in the demo
MEAN_OF_8 = {"preset": "fast", "ensemble": 8, "ensemble_output": "mean"}
COLUMNS = {  # path of keys in a result: title, digits
    "standard/psnr": ("PSNR [dB] ↑", 2),
    "standard/ssim": ("SSIM ↑", 3),
    "standard/scc": ("SCC ↑", 4),
    "standard/lpips": ("LPIPS ↓", 3),
    "standard/dists": ("DISTS ↓", 3),
    "standard/squeezenet": ("SqueezeNet distance ↓", 3),
    "set/squeezenet_frechet": ("SqueezeNet Fréchet distance ↓", 2),
    "set/fid": ("FID ↓", 1),
    "set/identity_collapse": ("identity collapse", 2),
    "fine": ("fine power", 3),
}
COMPARED = ("psnr", "ssim", "squeezenet")
FINE = 0.25  # cycles per pixel; wavelengths below 4 px
EXAMPLES = 5


@dataclass(frozen=True)
class Job:
    method: str
    updates: int
    seed: int

    def folder(self, output: Path) -> Path:
        return output / "runs" / f"{self.method}-{self.updates}-seed{self.seed}"


# ----------------------------------------------------------------------------------------------------------- commands
def training_commands(job: Job, output: Path) -> list[list[str]]:
    """Command lines, without Python, that train a method; those of rival_models.py also translate."""
    folder = job.folder(output)
    if job.method in METHODS:
        options = {"method": job.method, "updates": job.updates, "seed": job.seed, "output": folder}
        return [["benchmarks/rival_models.py", *words(options)]]
    first = max(1, round(STAGE1 * job.updates))
    common = {"seed": job.seed, "num_warmup": min(WARMUP, first), "val_len": 8, "mixed_precision": MIXED_PRECISION}
    common["latent_cache"] = output / "latents"
    stage1 = {"config": "configs/demo.yaml", **common}
    if job.method == "mse":
        return [["main.py", *words({**stage1, "work_dir": folder / "stage2", "num_iter": job.updates})]]
    stages = [
        {**stage1, "work_dir": folder / "stage1", "num_iter": first},
        {
            **common, "config": "configs/demo_conf.yaml", "work_dir": folder / "stage2", "num_iter": job.updates - first,
            "accelerator_path": folder / "stage1/best",
        },
    ]  # fmt: skip
    return [["main.py", *words(stage)] for stage in stages]


def translation_commands(job: Job, output: Path) -> dict[tuple[str, str], list[str]]:
    """{(part, output): command line} of this program's own methods."""
    if job.method in METHODS:
        return {}
    folder, commands = job.folder(output), {}
    for part in PARTS:
        for name, sampling in (("sample", {}), ("mean", MEAN_OF_8)):
            options = {
                "sar_dir": PAIRS / part / "sar", "checkpoint": folder / "stage2/best", "batch_size": 32, "precision": PRECISION,
                "output_dir": folder / part / name / "eo", **sampling,
            }  # fmt: skip
            commands[part, name] = ["test.py", *words(options)]
    return commands


# ------------------------------------------------------------------------------------------------------------ budgets
def pilot(output: Path) -> dict:
    """{"encoding_s", "update_s": {method: s}}, measured once and kept."""
    file = output / "pilot.json"
    if not file.is_file():
        shutil.rmtree(output / "latents", ignore_errors=True)
        with_encoding = time_training(Job("mse", PILOT[0], 0), output)
        times = {method: [time_training(Job(method, updates, 0), output) for updates in PILOT] for method in TITLES}
        update_s = {method: (long - short) / (PILOT[1] - PILOT[0]) for method, (short, long) in times.items()}
        write_json(file, {"encoding_s": with_encoding - times["mse"][0], "update_s": update_s})
    return json.loads(file.read_text())


def time_training(job: Job, output: Path) -> float:
    """Seconds of a short training: of this program's commands in all, of the rivals the training alone."""
    folder = job.folder(output)
    shutil.rmtree(folder, ignore_errors=True)
    commands = training_commands(job, output)
    if job.method in METHODS:
        commands[0].append("--train-only")
    seconds = [timed(command, folder / f"pilot{number}.log")["seconds"] for number, command in enumerate(commands)]
    return json.loads((folder / "record.json").read_text())["training_s"] if job.method in METHODS else sum(seconds)


def budgets(measured: dict, minutes: float) -> dict[str, dict[str, int]]:
    """{budget: {method: updates}}; stage 1 alone makes as many as C-DiffSET, whose updates take as long, nearly."""
    seconds = 60 * minutes
    ours = int((seconds - measured["encoding_s"]) / measured["update_s"]["cdiffset"])
    if ours < 2:
        raise UserError(f"--minutes: expected more, {minutes:g} are gone with {measured['encoding_s']:.0f} s of encoding")
    others = {method: int(seconds / measured["update_s"][method]) for method in METHODS}
    return {"minutes": {**others, "mse": ours, "cdiffset": ours}, "updates": dict.fromkeys(TITLES, ours)}


# --------------------------------------------------------------------------------------------------------------- runs
def run_job(job: Job, output: Path) -> dict:
    """Train, translate and evaluate, unless it is done => its result, which is also kept in result.json."""
    folder = job.folder(output)
    file = folder / "result.json"
    if not file.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # what is half done has not been timed as a whole
        trained = [timed(command, folder / f"train{i}.log") for i, command in enumerate(training_commands(job, output))]
        translated = {
            key: timed(command, folder / f"{'-'.join(key)}.log") for key, command in translation_commands(job, output).items()
        }
        result = {"method": job.method, "updates": job.updates, "seed": job.seed}
        result["gib"] = max(each["gib"] for each in [*trained, *translated.values()])
        if job.method in METHODS:
            result |= json.loads((folder / "record.json").read_text())
        else:
            result["training_s"] = sum(each["seconds"] for each in trained)
            said = re.search(r"(\d+) images translated in ([\d.]+) s", (folder / "test-sample.log").read_text())
            result["s_per_image"] = float(said[2]) / int(said[1])
        result["parts"] = {part: {} for part in PARTS}
        for part, name in product(PARTS, OUTPUTS):
            if (folder / part / name / "eo").is_dir():
                result["parts"][part][name] = evaluated(folder / part / name, PAIRS / part)
        write_json(file, result)
    return json.loads(file.read_text())


def evaluated(folder: Path, pairs: Path) -> dict:
    """evaluate.py's report of one folder of pictures => {"standard", "set", "images": {name: values}, "power", "fine"}."""
    report = evaluate_folders(EvaluationFolders(folder / "eo", pairs / "eo", pairs / "sar"), folder / "report", num_workers=0)
    lines = (folder / "report/metrics.csv").read_text().splitlines()
    columns = [lines[0].split(",").index(f"standard/{metric}") for metric in COMPARED]
    values = {fields[0]: [float(fields[column]) for column in columns] for fields in (line.split(",") for line in lines[1:])}
    names = [name.with_suffix(".png") for name in list_images(pairs / "eo")]
    power, truth = radial_power(read_stack(folder / "eo", names)), true_power(pairs)
    fine = np.linspace(0, 0.5, len(truth)) > FINE
    return {
        "standard": {metric: entry["mean"] for metric, entry in report["means"]["standard"].items()},
        "set": {metric: entry["value"] for metric, entry in report["set"].items()},
        "images": values,
        "power": power.tolist(),
        "fine": float(power[fine].sum() / truth[fine].sum()),
    }


def read_stack(folder: Path, names: list[Path]) -> np.ndarray:
    return np.stack([read_eo(folder / name) for name in names])


def true_power(pairs: Path) -> np.ndarray:
    return radial_power(read_stack(pairs / "eo", list_images(pairs / "eo")))


def radial_power(images: np.ndarray) -> np.ndarray:
    """Square images [N, S, S, 3] in 0-255 => mean power of their grey values at k / S cycles per pixel, [S // 2 + 1].

    A Hann window first, so that the borders' jump does not leak; mean over the images and all frequencies that round to k.
    """
    side = images.shape[1]
    grey = images.mean(-1)
    window = np.outer(*[np.hanning(side)] * 2)
    power = (np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2).mean(0)
    frequency = np.fft.fftfreq(side) * side
    ring = np.hypot(frequency[:, None], frequency[None]).round().astype(int).ravel()
    return (np.bincount(ring, power.ravel()) / np.bincount(ring))[: side // 2 + 1]


# ------------------------------------------------------------------------------------------------------------- report
def rows_of(results: list[dict], planned: dict[str, int], part: str) -> Iterator[tuple[str, list[dict], list[dict]]]:
    """(title, results of the seeds, their numbers of this part) for each method and output of a budget."""
    for method, title in TITLES.items():
        runs = [result for result in results if (result["method"], result["updates"]) == (method, planned[method])]
        for name, suffix in OUTPUTS.items():
            if runs and name in runs[0]["parts"][part]:
                yield title + suffix, runs, [result["parts"][part][name] for result in runs]


def at(numbers: dict, path: str) -> float | None:
    for key in path.split("/"):
        numbers = numbers.get(key) if isinstance(numbers, dict) else None
    return numbers


def picture_table(results: list[dict], planned: dict[str, int], part: str) -> str:
    rows = list(rows_of(results, planned, part))
    shown = [path for path in COLUMNS if any(at(numbers[0], path) is not None for _, _, numbers in rows)]
    lines = [
        [title, *(cell([at(each, path) for each in numbers], COLUMNS[path][1]) for path in shown)] for title, _, numbers in rows
    ]
    return table(["method", *(COLUMNS[path][0] for path in shown)], lines)


def cost_table(results: list[dict], planned: dict[str, int]) -> str:
    costs = {"training_s": ("training [min]", 60), "s_per_image": ("translation [s per image]", 1), "gib": ("memory [GiB]", 1)}
    lines = []
    for title, runs, _ in rows_of(results, planned, PARTS[0]):
        if not title.endswith(OUTPUTS["mean"]):
            values = [f"{np.median([result[key] for result in runs]) / unit:.3g}" for key, (_, unit) in costs.items()]
            lines.append([title, runs[0]["updates"], *values])
    return table(["method", "updates", *(title for title, _ in costs.values())], lines)


def difference_table(results: list[dict], planned: dict[str, int], part: str) -> str:
    """What C-DiffSET has more than each other method, sample against sample and mean against mean, or against the only output.

    Intervals over the places that the test tiles come from.
    """
    by_image = {title: [numbers["images"] for numbers in seeds] for title, _, seeds in rows_of(results, planned, part)}
    pairs = []
    for suffix in OUTPUTS.values():
        mine = TITLES["cdiffset"] + suffix
        others = [method + suffix if method + suffix in by_image else method for method in list(TITLES.values())]
        pairs += [(mine, other) for other in others if mine in by_image and other in by_image and other != mine]
    lines = []
    for name, title in pairs:
        ours, theirs = by_image[name], by_image[title]
        names = sorted(ours[0])
        mine, other = (np.mean([[seed[name] for name in names] for seed in seeds], 0) for seeds in (ours, theirs))
        gap, places = mine - other, [name.split("_")[0] for name in names]
        means = np.array([gap[[place == each for place in places]].mean(0) for each in sorted(set(places))])
        low, high = np.percentile(resampled_means(means), (2.5, 97.5), axis=0)
        lines.append(
            [
                f"{name} minus {title}",
                *(f"{m:+.3f} ({a:+.3f} to {b:+.3f})" for m, a, b in zip(means.mean(0), low, high, strict=True)),
            ]
        )
    return table(["difference", *(COLUMNS[f"standard/{metric}"][0] for metric in COMPARED)], lines)


def write_report(results: list[dict], planned: dict[str, dict[str, int]], measured: dict, minutes: float, output: Path) -> None:
    seeds = sorted({result["seed"] for result in results})
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    text = f"""# C-DiffSET and what people would use instead, on real pairs

Written by `python benchmarks/rivals.py --minutes {minutes:g}`
on {machine("cpu")} (Python {platform.python_version()}, {packages}).

- Pairs: `data/sentinel_demo`, 1,014 for training. `test`: held-out places in the regions of the training; `unseen`: another.
- Seeds {", ".join(map(str, seeds))}; ± is the half-width of the 95 % interval over them (Student's t).
- Precision of all methods: {PRECISION}.
- Methods: see `benchmarks/rival_models.py`. C-DiffSET starts from `{BASE.relative_to(REPO)}`, which was pretrained on the EO of
  the training pairs alone; the others start from nothing. That pretraining is not counted, as Stable Diffusion's is not.
- Training minutes: of C-DiffSET those of whole commands, start-up and validation included; of the others of training alone.
- Encoding the latents, {measured["encoding_s"]:.0f} s, is taken off C-DiffSET's minutes; the training column leaves it out,
  since all runs share the latents. Stage 1 alone makes as many updates as both stages.
- Standard convention. SqueezeNet distance, Fréchet distance: docs/evaluation.md; they are neither LPIPS nor FID. Identity
  collapse: error against the SAR over that against the EO, below 1 for a copy of the SAR. Fine power: the radial spectrum at
  wavelengths below 4 px, summed, over the truth's; 1 is right, less is blurred, more is noise.
"""
    for budget, updates in planned.items():
        how = f"Equal minutes: {minutes:g}" if budget == "minutes" else f"Equal updates: {updates['cdiffset']:,} of 16 images"
        text += f"\n## {how}\n\n{cost_table(results, updates)}\n"
        for part in PARTS:
            text += f"\n`{part}`:\n\n{picture_table(results, updates, part)}\n"
        text += "\nOn `test`, mean over seeds; 95 % intervals by a bootstrap over 8 test places, which are few:\n\n"
        text += f"{difference_table(results, updates, 'test')}\n"
    write_text(output / "RIVALS.md", text)
    write_json(output / "results.json", {"pilot": measured, "budgets": planned, "results": results})
    figure(results, planned["minutes"], output)
    print(text)


def figure(results: list[dict], planned: dict[str, int], output: Path) -> None:
    """Evenly chosen test tiles, a column for each method of the first seed, and the spectra of all."""
    names = list_images(PAIRS / "test/eo")
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, EXAMPLES + 2).round().astype(int)[1:-1]]
    columns = {"SAR": np.stack([read_sar(PAIRS / "test/sar" / name) for name in chosen])}
    columns["EO"] = read_stack(PAIRS / "test/eo", chosen)
    spectra = Figure(figsize=(8, 5), layout="constrained")
    axes = spectra.add_subplot()
    truth = true_power(PAIRS / "test")
    frequency = np.linspace(0, 0.5, len(truth))[1:]
    axes.loglog(frequency, truth[1:], "k", label="true EO")
    for title, runs, numbers in rows_of(results, planned, "test"):
        axes.loglog(frequency, np.mean([each["power"] for each in numbers], 0)[1:], label=title)
        name = "mean" if title.endswith(OUTPUTS["mean"]) else "sample"
        folder = Job(runs[0]["method"], runs[0]["updates"], runs[0]["seed"]).folder(output) / "test" / name / "eo"
        columns[title] = read_stack(folder, [each.with_suffix(".png") for each in chosen])
    axes.set(xlabel="cycles per pixel", ylabel="power", title="Radially averaged power of the grey values, test tiles")
    axes.legend()
    spectra.savefig(output / "spectra.png", dpi=100)
    rows = [
        utils.panel([to_tensor(images[row]) for images in columns.values()], list(columns) if row == 0 else None)
        for row in range(len(chosen))
    ]
    write_png(output / "figure.png", np.concatenate(rows))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="C-DiffSET against what people would use instead.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of the report")
    parser.add_argument("--minutes", type=float, default=6, help="of training per method [6]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    check_settings(output, {"base": base_hashes()})
    measured = pilot(output)
    planned = budgets(measured, args.minutes)
    jobs = dict.fromkeys(  # in an order that soon gives a whole table; those of both budgets once
        Job(method, planned[budget][method], seed) for seed in args.seeds for budget in planned for method in TITLES
    )
    results = []
    for number, job in enumerate(jobs, start=1):
        print(f"{number} of {len(jobs)}: {job.method}, {job.updates} updates, seed {job.seed}", flush=True)
        results.append(run_job(job, output))
    write_report(results, planned, measured, args.minutes, output)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
