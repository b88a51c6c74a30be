"""Translating test pairs and measuring the pictures: in training every few epochs, in phase test the whole list."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import UNet2DConditionModel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import utils
from cdiffset.checkpoint import read_meta
from cdiffset.config import Config
from cdiffset.errors import UserError
from cdiffset.evaluation.evaluate import evaluate_folders
from cdiffset.evaluation.folders import EvaluationFolders
from cdiffset.hub import find_checkpoint
from cdiffset.images import write_png, write_tiff
from cdiffset.model import check_base
from cdiffset.pipeline import confidence_map, image_noise, to_uint8, translate, variance_map
from cdiffset.training.batches import batches_of, loader_options
from cdiffset.training.logs import RunLogs
from cdiffset.training.networks import Networks, check_crops, load_networks
from cdiffset.training.processes import make_accelerator
from cdiffset.training.state import RunFolder
from feeders.feeder import build_feeder


class NotFinite(UserError):
    """The U-Net computes NaN or Inf."""


class Validator:
    """Translates pairs of the test feeder, each process its part, from the noise that test.py would give them."""

    def __init__(self, config: Config, accelerator: Accelerator, feeder, networks: Networks, logs: RunLogs):
        self.config, self.accelerator, self.feeder, self.networks, self.logs = config, accelerator, feeder, networks, logs

    def rows(
        self, unet: UNet2DConditionModel, indices: range, folder: Path, before_batch: Callable = lambda: None
    ) -> list[dict]:
        """One row of metrics per pair, in list order, on all processes. A picture of each pair goes to `folder`."""
        rows = []
        for batch, generated, sigma2 in self.translations(unet, indices, "validating", before_batch):
            rows += utils.image_rows(batch["name"], self.metrics(generated, batch["eo"]))
            write_pictures(folder, batch, generated, sigma2)
        place = {self.feeder.names[index]: index for index in indices}
        return sorted(gather_object(rows), key=lambda row: place[row["name"]])

    def translations(
        self, unet: UNet2DConditionModel, indices: range, what: str, before_batch: Callable = lambda: None
    ) -> Iterator[tuple[dict, torch.Tensor, torch.Tensor | None]]:
        """This process's part of the pairs, a batch at a time: (batch, generated [B, 3, H, W], σ² [B, 1, h, w] or None).

        `before_batch` is called by all processes together, equally often, whatever their parts.
        """
        config, accelerator, device = self.config, self.accelerator, self.accelerator.device
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        options = loader_options(config, device)
        batches = batches_of(DataLoader(Subset(self.feeder, mine), config.test_batch_size, **options))
        largest = math.ceil(len(indices) / accelerator.num_processes)  # the first process's part, none has more
        rounds = range(math.ceil(largest / config.test_batch_size))
        for _ in tqdm(rounds, desc=what, unit="batch", disable=not accelerator.is_main_process, leave=False, mininterval=1):
            before_batch()
            if (batch := next(batches, None)) is None:
                continue
            with accelerator.autocast():
                generated, sigma2 = translate(
                    unet, self.networks.vae, self.networks.scheduler, batch["sar"].to(device), self.starting_noise(batch),
                    self.networks.prompt_embedding, config.num_inference_steps,
                )  # fmt: skip
            if not generated.isfinite().all():
                raise NotFinite("the generated images are not finite")
            yield batch, generated, sigma2

    def starting_noise(self, batch: dict) -> torch.Tensor:
        """The noise [B, C, h, w] that test.py would give these images with the run's seed."""
        images = batch["sar_pixels"].numpy() if "sar_pixels" in batch else to_uint8(batch["sar"])  # other feeders: 8-bit data
        return image_noise(self.networks.vae, self.config.seed, images)

    def require(self, metric: str) -> None:
        """UserError where a metric cannot be measured here or on the test pairs, before anything is trained."""
        side = getattr(self.feeder, "crop_size", None)  # a feeder of another origin may have none
        if side and (reason := utils.misfit(metric, side, side)):
            raise UserError(f"best_metric: {metric} {reason} (test_feeder_args.crop_size)")
        if metric in ("lpips", "dists") and (reason := self.metrics.absent.get(metric)):
            raise UserError(f"best_metric: {metric} is not available here: {reason}")

    @cached_property
    def metrics(self) -> utils.PairMetrics:
        with_dists = True if self.config.best_metric == "dists" else None
        metrics = utils.PairMetrics(self.accelerator.device, self.config.lpips, with_dists)
        for name, reason in metrics.absent.items():
            self.logs.val.info("%s is left out: %s", name, reason)
        return metrics


def run_test(config: Config) -> None:
    """phase: test. Translate the whole test list, then evaluate the pictures as evaluate.py does."""
    accelerator = make_accelerator(config)
    check_base(config.pretrained_model_name_or_path)
    run, feeder = RunFolder(config, accelerator), build_feeder(config, "test")
    logs = run.open()
    start = find_checkpoint(config.accelerator_path or str(run.newest_result()), "accelerator_path")
    networks = load_networks(config, accelerator, start, "accelerator_path", logs.train)
    check_crops(networks.vae, {"test": feeder})
    validator, folder = Validator(config, accelerator, feeder, networks, logs), run.path / "test"
    try:
        if accelerator.is_main_process:  # whole folders are evaluated: pictures of an earlier, longer list must not count
            for name in ("results", "generated", "eo", "sar", "variance"):
                shutil.rmtree(folder / name, ignore_errors=True)
        accelerator.wait_for_everyone()
        for batch, generated, sigma2 in validator.translations(networks.unet.eval(), range(len(feeder)), "translating"):
            write_pictures(folder / "results", batch, generated, sigma2)
            write_images(folder, batch, generated, sigma2)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:  # nobody waits for it: evaluating a large set takes longer than a collective may
            maps = folder / "variance" if (folder / "variance").is_dir() else None
            inputs = EvaluationFolders(folder / "generated", folder / "eo", folder / "sar", variance_dir=maps)
            made_by = {
                "feeder": config.feeder, "checkpoint": start.source or str(start.path),
                "iterations": read_meta(start.path).get("iteration"),
                "num_inference_steps": config.num_inference_steps, "seed": config.seed,
            }  # fmt: skip
            report = evaluate_folders(
                inputs, folder, device=accelerator.device, num_workers=config.num_worker, networks=config.lpips, run=made_by
            )
            logs.val.info("test  n %d  %s", report["images"], json.dumps(report["means"]["standard"]))
            print((folder / "report.md").read_text(encoding="utf-8"))
        accelerator.end_training()  # threads of gloo that outlive the interpreter abort the process
    except OSError as error:  # a full disk, first of all; the feeders report faults of their own files
        raise UserError(f"cannot write into {run.path}: {error.strerror or error}") from error


def write_pictures(folder: Path, batch: dict, generated: torch.Tensor, sigma2: torch.Tensor | None) -> None:
    """One side-by-side picture per pair."""
    pictures = {"SAR": batch["sar"], "EO": batch["eo"], "generated EO": generated.cpu()}
    if sigma2 is not None:
        pictures["confidence"] = confidence_map(sigma2.cpu(), tuple(generated.shape[-2:]))
    for index, name in enumerate(batch["name"]):
        write_png(folder / f"{name}.png", utils.panel([images[index] for images in pictures.values()], list(pictures)))


def write_images(folder: Path, batch: dict, generated: torch.Tensor, sigma2: torch.Tensor | None) -> None:
    """generated/, eo/ and sar/ as PNG and, with σ², variance/ as TIFF: the folders that evaluate.py reads."""
    maps = None if sigma2 is None else variance_map(sigma2.cpu(), tuple(generated.shape[-2:]))
    for index, name in enumerate(batch["name"]):
        for kind, images in (("generated", generated), ("eo", batch["eo"]), ("sar", batch["sar"])):
            write_png(folder / kind / f"{name}.png", to_uint8(images[index]))
        if maps is not None:
            write_tiff(folder / "variance" / f"{name}.tif", maps[index, 0].numpy())
