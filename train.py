"""The Trainer: config -> feeder -> latents -> U-Net -> loss, validation by PSNR. `fit` is the loop."""

import copy
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader, Sampler, Subset
from tqdm import tqdm

import utils
from cdiffset import checkpoint
from cdiffset.attention import share_prompt
from cdiffset.confidence import confidence_map, variance_map
from cdiffset.config import Config, flatten
from cdiffset.device import be_deterministic, keep_freed_memory, without_instructions
from cdiffset.diffusion import image_noise, training_loss, translate
from cdiffset.errors import Stopped, UserError, message_of
from cdiffset.evaluation.evaluate import evaluate_folders
from cdiffset.evaluation.folders import EvaluationFolders
from cdiffset.images import to_uint8, write_png, write_tiff
from cdiffset.model import (
    base_prediction_type,
    check_base,
    check_latent_channels,
    check_prompt_width,
    embed_prompt,
    encode,
    load_base_unet,
    load_scheduler,
    load_unet,
    load_vae,
    patch_conv_in,
    patch_conv_out,
    vae_factor,
)
from cdiffset.training import fsdp
from cdiffset.training import launch as launcher
from cdiffset.training.latent_cache import LatentCache, Work
from cdiffset.training.weights import FUSED, Guard, gradient_norm, load_moments, make_optimizer, step_copies
from feeders.feeder import PairedFeeder, build_feeder

ECHO_S = 5  # launchers pass a signal on that the processes have got themselves
LONELY = (  # what `accelerate launch --num_processes 2` comes to without two GPUs, in silence
    "note: accelerate launch started one process only; for several on CPUs add --multi_gpu, or use torchrun --nproc-per-node"
)
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}  # fmt: skip
ORDER, NOISE = 1, 2  # purposes of random draws, so that no two share a stream

# Settings that may change between two parts of a run without changing what is learnt.
FREE_TO_CHANGE = {
    "phase", "work_dir", "num_worker", "gpu", "num_inference_steps", "val_len", "test_batch_size", "test_feeder_args",
    "lpips", "eval_epoch", "eval_each_epoch_from", "log_iter", "save_iter", "save_epoch", "checkpoints_total_limit", "resume",
    "report_to", "deterministic", "fsdp", "gradient_checkpointing", "gradient_accumulation_steps", "skip_nonfinite",
    "ema_on_cpu", "latent_cache",
}  # fmt: skip


def seeded(*key: int) -> torch.Generator:
    """A CPU generator that is a function of its key: (seed, purpose, iteration). Nothing random is stored or global."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class BatchOrder(Sampler):
    """This process's micro-batches of (epoch, index) keys, from iteration `start` to `num_iter`.

    The pairs are shuffled anew in every epoch by (seed, epoch), and what does not fill a batch is left out. All processes
    see one order and each takes its block of every batch, so that a batch means the same however many processes share it.
    """

    def __init__(self, length: int, config: Config, start: int, rank: int, world_size: int):
        self.length, self.seed, self.num_iter, self.start = length, config.seed, config.num_iter, start
        self.batch_size = min(config.batch_size, length)  # a list shorter than the batch is one short batch an epoch
        self.parts, self.part = world_size * config.gradient_accumulation_steps, rank * config.gradient_accumulation_steps
        self.micro_steps = config.gradient_accumulation_steps
        if self.batch_size % self.parts:
            raise UserError(
                f"batch_size: {self.batch_size} pairs cannot be shared evenly by {world_size} processes "
                f"x {self.micro_steps} accumulation steps"
            )
        self.iterations_per_epoch = length // self.batch_size

    def __len__(self) -> int:
        return (self.num_iter - self.start) * self.micro_steps

    def __iter__(self):
        for iteration in range(self.start, self.num_iter):
            epoch, step = divmod(iteration, self.iterations_per_epoch)
            if step == 0 or iteration == self.start:
                order = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.length)
            for micro in range(self.micro_steps):
                yield [(epoch, int(order[step * self.batch_size + place])) for place in range(*self.share(micro))]

    def in_blocks(self, block_of: Callable[[int], int]) -> Iterator[tuple[int, "BatchOrder"]]:
        """The same in successive parts, of the epochs of one block each: (block, its part)."""
        block_of_iteration = [
            block_of(iteration // self.iterations_per_epoch) for iteration in range(self.start, self.num_iter)
        ]
        start = self.start
        for block, iterations in groupby(block_of_iteration):
            part = copy.copy(self)
            part.start, part.num_iter = start, start + len(list(iterations))
            yield block, part
            start = part.num_iter

    def share(self, micro: int) -> tuple[int, int]:
        """Where this process's micro-batch lies in the batch: (first, end)."""
        size = self.batch_size // self.parts
        return (self.part + micro) * size, (self.part + micro + 1) * size


def data_record(feeder, arguments: dict) -> dict:
    """The pairs of a feeder, for the checkpoint: how many, and a hash of their names and files in the order of the list.

    Files count relative to the folder among the feeder's `arguments` that holds them, so that a dataset may move. Of a feeder
    of another origin only the names count, and without names the number.
    """
    record, lines = {"pairs": len(feeder)}, getattr(feeder, "names", None)
    if isinstance(feeder, PairedFeeder):
        folders = [Path(value) for value in arguments.values() if isinstance(value, str)]
        folders.sort(key=lambda folder: len(folder.parts), reverse=True)
        lines = [[pair.name, *(relative_to_any(folders, path) for path in (pair.sar, pair.eo))] for pair in feeder.pairs]
    if lines is not None:
        record["sha256"] = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    return record


def relative_to_any(folders: list[Path], path: Path) -> str:
    return next((path.relative_to(folder) for folder in folders if path.is_relative_to(folder)), path).as_posix()


def make_accelerator(mixed_precision: str) -> Accelerator:
    """What places this process on its device among the others.

    Batches go to the processes by BatchOrder, so Accelerate prepares the U-Net and the optimizer and nothing else.
    """
    if sharding := [name for variable, name in SHARDING.items() if os.environ.get(variable, "").lower() in ("1", "true")]:
        raise UserError(
            f"accelerate launch: expected plain data parallelism, found {sharding[0]}, which Accelerate leaves out on CPUs and "
            "whose checkpoints would be parts. Launch without it and set fsdp: true, which divides the model everywhere"
        )
    try:
        # `cpu` also tells a launcher's processes to talk by gloo where there is nothing to accelerate on.
        accelerator = Accelerator(
            mixed_precision=mixed_precision.removesuffix("_copy"), cpu=not torch.accelerator.is_available(),
            dynamo_backend="no",  # torch_compile compiles, and Accelerate would once more where its launcher was told to
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # one copy of the gradients, not two
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"mixed_precision: {mixed_precision} cannot be had on this machine ({error})") from error
    if accelerator.num_processes == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        print(LONELY, file=sys.stderr)
    return accelerator


class Trainer:
    """Builds every part of a run from its config, and refuses what cannot work before gigabytes are loaded."""

    def __init__(self, config: Config):
        self.config = config
        self.accelerator = make_accelerator(config.mixed_precision)
        self.device = self.accelerator.device
        if not config.fsdp:  # under which weights come and go all the time, and what is kept in between only grows
            keep_freed_memory(self.device)
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32" if config.tf32 else "ieee"
        self.is_main = self.accelerator.is_main_process
        if config.fsdp and config.phase == "train" and self.accelerator.num_processes == 1:
            raise UserError("fsdp: divides the model among processes, expected several, found 1: launch more, or fsdp: false")
        self.work_dir, self.lock = Path(config.work_dir), None
        self.board = None  # TensorBoard, while training
        self.found_at_start: list[str] = []  # what an earlier run left behind, for the log
        check_base(config.pretrained_model_name_or_path)
        self.test_feeder = build_feeder(config, "test")
        self.train_feeder = build_feeder(config, "train") if config.phase == "train" else None
        self.data = data_record(self.train_feeder, config.train_feeder_args) if config.phase == "train" else None
        resume_from = self.agree_on_resume() if config.phase == "train" else None
        self.open_work_dir()
        self.load_model(resume_from)
        self.check_crops()
        if config.phase == "train":
            self.prepare_training(resume_from)

    # ------------------------------------------------------------------------------------------------------------ set-up
    def open_work_dir(self) -> None:
        try:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            if self.is_main and self.config.phase == "train":
                self.lock = self.lock or checkpoint.lock(self.work_dir)
                (self.work_dir / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
            self.train_log = text_log(self.work_dir / "train_log.txt", self.is_main)
            self.val_log = text_log(self.work_dir / "val_log.txt", self.is_main)
        except OSError as error:
            raise UserError(f"work_dir: cannot write into {self.work_dir}: {error.strerror}") from error
        for line in self.found_at_start:
            self.train_log.info(line)

    def load_model(self, resume_from: Path | None) -> None:
        """The frozen VAE and prompt embedding, and the U-Net from the base, from accelerator_path or from a resumed run."""
        config, base = self.config, self.config.pretrained_model_name_or_path
        frozen_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.accelerator.mixed_precision]
        self.vae = load_vae(base, frozen_dtype).to(self.device, memory_format=torch.channels_last)
        self.scheduler = load_scheduler(base, config.prediction_type)
        self.prompt_embedding = embed_prompt(base, config.prompt).to(self.device)
        latent_channels = self.vae.config.latent_channels
        option, start = ("resume", str(resume_from)) if resume_from else ("accelerator_path", config.accelerator_path)
        if start is None and config.phase == "test":
            start = str(self.newest_result())
        if start is None:
            unet, origin = load_base_unet(base), f"the base model {base} (accelerator_path is null)"
            check_latent_channels(unet, self.vae, base)
            unet = patch_conv_in(unet)
        else:
            source = resume_from / "unet" if resume_from else start
            unet, weights = load_unet(str(source), base, latent_channels, option)
            origin = str(weights)
        has_variance = unet.config.out_channels == latent_channels + 1
        adds_variance = config.confidence and not has_variance and config.phase == "train"
        if adds_variance:
            unet = patch_conv_out(unet)
        elif has_variance and not config.confidence and config.phase == "train":
            raise UserError(
                f"{option}: stage 1 (confidence: false) expects {latent_channels} output channels, {start} has "
                f"{latent_channels + 1}: it is a stage 2 checkpoint"
            )
        check_prompt_width(unet, self.prompt_embedding, base, option)
        stage = "stage 2 (C-Diff loss)" if config.confidence else "stage 1 (MSE)"
        self.train_log.info(", ".join(f"{name} {getattr(config, name)}" for name, _ in launcher.SETTINGS.values()))
        added = ", with a variance channel added (stage 1 takes confidence: false)" if adds_variance else ""
        self.train_log.info("%s: %s, U-Net from %s%s", config.phase, stage, origin, added)
        if config.phase == "train" and (own := base_prediction_type(base)) != config.prediction_type:
            self.train_log.info(
                "warning: prediction_type is %s, but the scheduler of the base model %s says %s: its U-Net has to learn "
                "another target; set prediction_type: %s unless you mean that", config.prediction_type, base, own, own,
            )  # fmt: skip
        if note := without_instructions(self.device, self.accelerator.mixed_precision):
            self.train_log.info(note)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        share_prompt(unet)
        # fully_shard and bitsandbytes want their weights contiguous.
        last = config.optimizer in FUSED and not config.fsdp
        self.unet = unet.to(self.device, memory_format=torch.channels_last if last else torch.contiguous_format)

    def check_crops(self) -> None:
        """Read a pair of each feeder: crops must be multiples of the VAE's factor."""
        factor = vae_factor(self.vae)
        for which, feeder in (("train", self.train_feeder), ("test", self.test_feeder)):
            size = feeder[0]["sar"].shape[-1] if feeder is not None else factor
            if size % factor:
                raise UserError(f"{which}_feeder_args: crop_size {size}, expected a multiple of {factor}, the VAE's factor")

    def prepare_training(self, resume_from: Path | None) -> None:
        config = self.config
        be_deterministic(config.deterministic, self.device)
        # What is trained, averaged and saved is float32; what computes is the same network, or its bfloat16 copy.
        self.trained = self.unet.train()
        self.ema_unet = self.start_of_average(resume_from) if config.ema_decay else None
        if config.fsdp:
            for unet in filter(None, (self.trained, self.ema_unet)):
                fsdp.divide(unet, self.device)
        self.parameters = list(self.trained.parameters())
        optimizer = make_optimizer(config.optimizer, self.parameters, config.learning_rate, config.weight_decay)
        # Not prepared by Accelerate, which would step it once per process.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.num_warmup, num_training_steps=config.num_iter
        )
        self.ema_device = torch.device("cpu") if config.ema_on_cpu else self.device
        self.iteration, self.best_psnr, self.skipped = 0, -math.inf, 0
        self.unfinished = False  # whether validation and saving of the present iteration are still to be done
        self.window, self.signals = LogWindow(self.device), StopSignals(self.accelerator.num_processes)
        if resume_from:
            self.restore(resume_from, optimizer)
        self.saved = self.iteration  # the latest iteration that is on the disk
        if self.ema_unet:
            self.ema_unet.to(self.ema_device)
        if config.mixed_precision == "bf16_copy":
            copies = {id(weight): copy_of(weight) for weight in self.parameters}
            self.unet = copy.deepcopy(self.trained, copies)  # which takes these for the weights: never a float32 copy
        self.copies = None if self.unet is self.trained else list(self.unet.parameters())
        if config.torch_compile:
            check_compiler(self.device)
            self.unet.compile()
        measure = getattr(self.train_feeder, "sar_statistics", None)  # a feeder of another origin may have none
        self.sar_statistics = measure() if measure and self.is_main else None
        self.optimizer = self.accelerator.prepare(optimizer)
        if not config.fsdp:
            self.unet = self.accelerator.prepare(self.unet)
        self.reads_at_once = self.device.type == "cpu"  # where it costs nothing to know at once that a step was left out
        self.guard = Guard(self.accelerator, config.skip_nonfinite - self.skipped)
        self.order = BatchOrder(
            len(self.train_feeder), config, self.iteration, self.accelerator.process_index, self.accelerator.num_processes
        )
        self.latents = None
        if config.latent_cache:
            crops, epochs = config.latent_cache_crops, config.latent_cache_epochs
            folder, report = Path(config.latent_cache), self.train_log.info
            self.latents = LatentCache(folder, self.train_feeder, self.vae, crops, epochs, report)

    # ------------------------------------------------------------------------------------------------------------ resume
    def agree_on_resume(self) -> Path | None:
        """The checkpoint that all processes continue from, or None; the main one looks, once the folder is its own."""
        outcome = [None, None]
        if self.is_main:
            try:
                if self.work_dir.is_dir():
                    self.lock = checkpoint.lock(self.work_dir)
                    self.found_at_start = checkpoint.tidy(self.work_dir)
                outcome = [self.find_resume(), None]
            except (UserError, OSError) as error:
                outcome = [None, str(error)]
        folder, fault = broadcast_object_list(outcome)
        if fault:
            raise UserError(fault)
        return folder

    def find_resume(self) -> Path | None:
        """The checkpoint folder to continue from, or None; see `resume` in the config."""
        written, found = self.config.resume, checkpoint.list_checkpoints(self.work_dir)
        if written is None:
            if found:
                raise UserError(
                    f"resume: null starts afresh, but {self.work_dir} holds {found[-1].name}: take another work_dir"
                )
            return None
        if written not in ("auto", "latest"):
            checkpoint.require_state(Path(written))
            return Path(written)
        if not found:
            if written == "latest":
                raise UserError(f"resume: latest, but {self.work_dir} holds no checkpoint")
            return None
        newest, passed_over = checkpoint.newest_whole(self.work_dir)
        if newest is None:
            raise UserError(f"work_dir: no checkpoint to continue from: {'; '.join(passed_over)}; choose another work_dir")
        self.found_at_start += [f"passed over: {fault}" for fault in passed_over]
        if written == "auto" and (changed := self.changed_settings(newest)):
            raise UserError(
                f"work_dir: {self.work_dir} holds a run of other settings or data ({'; '.join(changed)}): choose another "
                f"work_dir, or continue it with these by --resume latest"
            )
        return newest

    def newest_result(self) -> Path:
        """What phase test judges where accelerator_path is null: this run's best, else its latest."""
        for name in ("best", "latest"):
            if (self.work_dir / name / checkpoint.META).is_file():
                return self.work_dir / name
        raise UserError(f"accelerator_path: null, and {self.work_dir} has neither best/ nor latest/: which checkpoint to test?")

    def changed_settings(self, folder: Path) -> list[str]:
        written, now = checkpoint.read_meta(folder)["config"], dict(flatten(asdict(self.config)))
        before = dict(flatten(asdict(Config()) | written))  # what an earlier version did not know was as by default
        names = [name for name in {**before, **now} if name.split(".")[0] not in FREE_TO_CHANGE]
        changed = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
        return changed + self.changed_data(checkpoint.read_meta(folder).get("data"))

    def changed_data(self, before: dict | None) -> list[str]:
        """What differs between the training pairs of a checkpoint and those of now; an earlier version kept no record."""
        if before is None or before == self.data:
            return []
        counts = [f"{record['pairs']} pairs" for record in (before, self.data)]
        return [
            "training data: " + (" -> ".join(counts) if len(set(counts)) == 2 else f"{counts[0]}, but other files or order")
        ]

    def start_of_average(self, resume_from: Path | None):
        """The average of the weights so far: a resumed run's, else that of the present weights alone."""
        average = copy.deepcopy(self.unet).requires_grad_(False).eval()
        if resume_from and (resume_from / "unet_ema").is_dir():
            base, latent_channels = self.config.pretrained_model_name_or_path, self.vae.config.latent_channels
            saved, _ = load_unet(str(resume_from / "unet_ema"), base, latent_channels, "resume")
            average.load_state_dict(saved.state_dict())
        return average

    def restore(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Optimizer, schedule, scaler and counters of a checkpoint; its U-Net and average are loaded already."""
        state, meta = checkpoint.read_state(folder)
        try:
            # The moments and the place in the schedule are the checkpoint's, all settings are this configuration's.
            load_moments(self.config.optimizer, optimizer, state["optimizer"])
            self.lr_scheduler.load_state_dict({**state["lr_scheduler"], "base_lrs": self.lr_scheduler.base_lrs})
            share = self.lr_scheduler.lr_lambdas[0](self.lr_scheduler.last_epoch)
            optimizer.param_groups[0]["lr"] = self.lr_scheduler.base_lrs[0] * share
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.skipped = state["skipped"]
            if len(windows := state["windows"]) == self.accelerator.num_processes:
                self.window.restore(windows[self.accelerator.process_index])
        except (KeyError, ValueError) as error:
            raise UserError(f"resume: the optimizer state of {folder} does not fit this configuration: {error}") from error
        self.iteration, self.best_psnr = meta["iteration"], -math.inf if meta["best_psnr"] is None else meta["best_psnr"]
        self.unfinished = meta["unfinished"]
        self.train_log.info("resumed from %s at iteration %d", folder, self.iteration)
        for name in self.changed_settings(folder):
            self.train_log.info("changed since: %s", name)
        before, now = meta["batch_parts"], self.batch_parts()
        if before != now:
            self.train_log.info("batches are shared as %s, before as %s: equal up to rounding, not bit for bit", now, before)

    def batch_parts(self) -> str:
        return f"{self.accelerator.num_processes} processes x {self.config.gradient_accumulation_steps} accumulation steps"

    def save(self, names: list[str], unfinished: bool = False) -> None:
        """Write the present state under each name (one set of files)."""
        self.check_finite()
        windows = gather_object([self.window.state()])
        optimizer = fsdp.whole(self.optimizer.state_dict(), self.is_main)
        unet, ema_unet = (fsdp.whole_unet(unet, self.is_main) if unet else None for unet in (self.trained, self.ema_unet))
        if self.is_main:
            state = {
                "optimizer": optimizer,
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "windows": windows,
                "skipped": self.skipped,
            }
            base = Path(self.config.pretrained_model_name_or_path).expanduser()
            meta = {
                "iteration": self.iteration,
                "unfinished": unfinished,
                "epoch": self.iteration // self.order.iterations_per_epoch,
                "batch_parts": self.batch_parts(),
                "best_psnr": self.best_psnr if math.isfinite(self.best_psnr) else None,
                "gsd_m": getattr(self.train_feeder, "gsd_m", None),
                "sar_statistics": self.sar_statistics,
                "radiometry": getattr(self.train_feeder, "radiometry", {}),
                "data": self.data,
                "base_folder": os.path.abspath(base) if base.is_dir() else None,  # which commands started elsewhere find
                "config": asdict(self.config),
            }
            checkpoint.write_checkpoint(self.work_dir, names, unet, ema_unet, state, meta)
            checkpoint.prune(self.work_dir, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        self.saved = self.iteration

    # ---------------------------------------------------------------------------------------------------------- training
    def run(self) -> None:
        try:
            if self.config.phase == "test":
                self.test()
            else:
                with self.signals:
                    self.train()
            self.accelerator.end_training()  # threads of gloo that outlive the interpreter abort the process
        except OSError as error:  # a full disk, first of all; the feeders tell of their own files themselves
            raise UserError(f"cannot write into {self.work_dir}: {error.strerror or error}; {self.last_good()}") from error
        finally:
            if self.board:
                with suppress(OSError):  # what it could not write it has told before
                    self.board.close()

    def train(self) -> None:
        """`fit`, and where it ends early, a checkpoint of what is done so far."""
        if self.is_main and self.config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # What a killed run wrote after the checkpoint will be written again.
            self.board = SummaryWriter(str(self.work_dir / "tensorboard"), purge_step=self.iteration + 1)
        try:
            self.fit()
        except Stopped as stopped:
            self.save_early()
            self.accelerator.end_training()
            raise Stopped(f"{stopped}; {self.last_good()}; the same command continues") from None
        except LoaderFault as fault:
            if self.accelerator.num_processes == 1:  # else the others are in the middle of something
                self.save_early()
            if self.signals.received:  # some schedulers signal the loader processes as well
                raise Stopped(f"{self.signals.name()}; {self.last_good()}; the same command continues") from None
            raise UserError(f"{fault}; stopped after iteration {self.iteration}; {self.last_good()}") from None
        self.train_log.info("finished: %d iterations, best PSNR %.3f dB", self.iteration, self.best_psnr)

    def save_early(self) -> None:
        if self.iteration > self.saved:
            self.save(["latest"], self.unfinished)

    def fit(self) -> None:
        """Train to num_iter, validating and saving on the way."""
        config = self.config
        bar = tqdm(
            total=config.num_iter, initial=self.iteration, desc="training", unit="it", disable=not self.is_main, mininterval=1
        )
        with bar:  # closed also by an error, whose message then has a line of its own
            if self.unfinished:
                self.validate_and_save()
            batches = self.train_batches()
            while self.iteration < config.num_iter:
                self.signals.stop_if_asked()
                self.step(batches)
                self.iteration += 1
                self.unfinished = True
                bar.update()
                if self.iteration == config.num_iter or self.iteration % config.log_iter == 0:
                    self.log(bar)
                paused = time.monotonic()
                self.validate_and_save()
                self.window.started += time.monotonic() - paused  # images/s are those of training alone

    def validate_and_save(self) -> None:
        improved = self.validation_is_due() and self.validate()
        self.unfinished = False
        if names := self.checkpoint_names(improved, last=self.iteration == self.config.num_iter):
            self.save(names)

    def train_batches(self) -> Iterator[dict]:
        """The batches of the rest of the run: images, or cached latents, which are written first where they are missing."""
        if self.latents is None:
            yield from self.batches(self.train_loader(self.train_feeder, self.order))
            return
        with closing(self.latents):
            for block, order in self.order.in_blocks(self.latents.views.block):
                yield from self.batches(self.train_loader(self.cached_pairs(block), order))

    def cached_pairs(self, block: int):
        """The dataset of latents of a block of epochs."""
        size = self.order.batch_size // self.order.parts
        work = Work(self.encode, self.view_loader, size, lambda: bool(self.signals.received), self.is_main)
        paused = time.monotonic()
        try:
            pairs = self.latents.open(block, work)
        except UserError as error:
            raise LoaderFault(message_of(error)) from error
        self.window.started += time.monotonic() - paused
        self.signals.stop_if_asked()
        return pairs

    def view_loader(self, views, batch_size: int) -> Iterator[dict]:
        """Batches of images for the cache, in order."""
        pin = self.device.type == "cuda"
        return self.batches(
            DataLoader(
                views, batch_size, num_workers=self.config.num_worker, pin_memory=pin, worker_init_fn=in_a_group_of_its_own
            )
        )

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] => latents [B, C, h, w] on the device.

        Contiguous whatever layout the VAE leaves, as the cache gives them: the U-Net rounds otherwise in another layout.
        """
        with torch.no_grad():
            return encode(self.vae, pixels.to(self.device, non_blocking=True)).contiguous()

    def train_loader(self, pairs, order: BatchOrder) -> DataLoader:
        workers = self.config.num_worker
        return DataLoader(
            pairs,
            batch_sampler=order,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            # Items draw from (seed, epoch, index); this is for feeders of other origin that use the workers' own generators.
            generator=seeded(self.config.seed, ORDER, self.iteration, self.accelerator.process_index),
            worker_init_fn=in_a_group_of_its_own,
        )

    def batches(self, loader: DataLoader):
        """The loader's batches; LoaderFault where one cannot be had, always between two steps of the training."""
        try:
            batches = iter(loader)
            # PyTorch would break into whatever is being computed when a loader process dies; `next` notices it as well.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except UserError as error:
            raise LoaderFault(message_of(error)) from error
        except (RuntimeError, OSError, EOFError) as error:  # a dying process may also reset a connection
            if loader.num_workers == 0 or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                raise
            raise LoaderFault(f"num_worker: a loader process died: {str(error).splitlines()[0]}") from error

    def step(self, batches) -> None:
        """One optimizer step on one batch, in gradient_accumulation_steps parts."""
        parts, names = [], []
        for micro in range(self.order.micro_steps):
            batch = next(batches)
            names += batch["name"]
            if self.latents:
                z_sar, z_eo = (batch[kind].to(self.device, non_blocking=True) for kind in ("z_sar", "z_eo"))
            else:
                z_sar, z_eo = (self.encode(batch[kind]) for kind in ("sar", "eo"))
            if micro == 0:
                noise, timesteps = self.draw_noise(z_eo.shape[1:])
            mine = slice(*self.order.share(micro))
            with self.accelerator.no_sync(self.unet) if micro < self.order.micro_steps - 1 else nullcontext():
                with self.accelerator.autocast():
                    loss, sigma2 = training_loss(
                        self.unet, self.scheduler, z_sar, z_eo, noise[mine], timesteps[mine], self.prompt_embedding,
                        self.config.beta,
                    )  # fmt: skip
                self.accelerator.backward(loss / self.order.micro_steps * self.guard.factor())
            parts.append((loss.detach(), timesteps[mine], sigma2))
        self.accelerator.unscale_gradients()
        grad_norm = gradient_norm(self.copies or self.parameters)
        if self.config.fsdp:
            grad_norm = torch.linalg.vector_norm(self.accelerator.gather(grad_norm))  # each had that of its parts
        loss = sum(loss for loss, *_ in parts) / len(parts)
        blocked = self.guard.watch(self.iteration + 1, loss, grad_norm, timesteps, names)
        self.window.add(
            parts, grad_norm, self.optimizer.param_groups[0]["lr"], blocked, self.scheduler.config.num_train_timesteps
        )
        self.update_weights(grad_norm, blocked)
        self.update_ema(blocked)
        self.lr_scheduler.step()
        self.unet.zero_grad()
        if self.reads_at_once:
            self.check_finite()

    def update_weights(self, grad_norm: torch.Tensor, blocked: torch.Tensor) -> None:
        """Clip, and step the optimizer unless `blocked`."""
        if self.accelerator.scaler is None:  # which tells the optimizer by itself
            if self.config.optimizer in FUSED:
                self.optimizer.optimizer.found_inf = blocked.float()
            elif blocked:
                return
        limit = self.config.max_grad_norm
        if self.copies:
            factor = None if limit is None else (limit / (grad_norm + 1e-6)).clamp(max=1)
            step_copies(self.optimizer, self.parameters, self.copies, factor)
        else:
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, grad_norm)
            self.optimizer.step()

    def draw_noise(self, latent_shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise [batch, C, h, w] and timesteps [batch] of a whole batch, a function of (seed, iteration)."""
        generator = seeded(self.config.seed, NOISE, self.iteration)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (self.order.batch_size,), generator=generator)
        noise = torch.randn(self.order.batch_size, *latent_shape, generator=generator)
        return self.to_device(noise), self.to_device(timesteps)

    def to_device(self, values: torch.Tensor) -> torch.Tensor:
        """From pinned memory, else the copy to a GPU would wait for all that the GPU still has to do."""
        if self.device.type == "cuda" and not values.is_pinned():
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def check_finite(self) -> None:
        """Tell of the steps that were left out since the last time, or end the run; all processes come here together."""
        for iteration, loss, grad_norm, timesteps, names in self.guard.read():
            diagnosis = (
                f"iteration {iteration}: the gradient norm is {grad_norm} and the loss {loss:.4g}, at timesteps {timesteps}, "
                f"for {', '.join(gather_object(names))}"
            )
            self.skipped += 1
            if self.skipped > self.config.skip_nonfinite:
                raise UserError(f"{diagnosis}; the weights are as before this step and were not saved; {self.last_good()}")
            self.train_log.info("step left out (%d of %d): %s", self.skipped, self.config.skip_nonfinite, diagnosis)
            self.window.leave_out_a_step(self.order.micro_steps)

    def last_good(self) -> str:
        kept = checkpoint.list_checkpoints(self.work_dir)
        return f"last good checkpoint: {kept[-1] if kept else 'none yet'}"

    def update_ema(self, blocked: torch.Tensor) -> None:
        """Exponential average of the weights, with a short memory at first: decay min(ema_decay, (1 + n) / (10 + n))."""
        if self.ema_unet is None:
            return
        decay = min(self.config.ema_decay, (1 + self.iteration) / (10 + self.iteration))
        weight = (1 - decay) * ~blocked.to(self.ema_device)
        for average, parameter in zip(self.ema_unet.parameters(), self.parameters, strict=True):
            average.lerp_(parameter.detach().to(self.ema_device), weight)

    def log(self, bar: tqdm) -> None:
        self.check_finite()
        if not self.window.steps:  # every step was left out
            return
        values = self.window.read(self.accelerator)
        values["images_per_s"] = self.window.steps_here * self.order.batch_size / self.window.seconds()
        self.window.reset()
        epoch = self.iteration / self.order.iterations_per_epoch
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.train_log.info("iteration %d/%d  epoch %.2f  %s", self.iteration, self.config.num_iter, epoch, text)
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_s']:.1f} images/s", refresh=False)
        self.add_scalars("train", values)

    def add_scalars(self, group: str, values: dict[str, float]) -> None:
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, self.iteration)
            self.board.flush()

    def checkpoint_names(self, improved: bool, last: bool) -> list[str]:
        """The folders that are due now, the numbered one first; `latest` goes with any of them."""
        config, names = self.config, []
        if config.save_iter and self.iteration % config.save_iter == 0:
            names.append(f"checkpoint-{self.iteration}")
        epoch, rest = divmod(self.iteration, self.order.iterations_per_epoch)
        if config.save_epoch and rest == 0 and epoch % config.save_epoch == 0:
            names.append(f"epoch-{epoch}")
        if improved:
            names.append("best")
        return [*names, "latest"] if names or last else []

    # -------------------------------------------------------------------------------------------------------- validation
    def validation_is_due(self) -> bool:
        """Every eval_epoch epochs, every epoch in the last part of training, and at the end."""
        config, (epoch, rest) = self.config, divmod(self.iteration, self.order.iterations_per_epoch)
        if self.iteration == config.num_iter:
            return True
        late = self.iteration > config.eval_each_epoch_from * config.num_iter
        return rest == 0 and (late or (config.eval_epoch > 0 and epoch % config.eval_epoch == 0))

    def validate(self) -> bool:
        """Translate the first val_len test pairs => whether their mean PSNR is the best so far."""
        self.check_finite()
        folder = self.work_dir / "results" / f"iteration-{self.iteration:06d}"
        rows = self.evaluate(range(min(self.config.val_len, len(self.test_feeder))), folder)
        means = utils.flat_means(rows)
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        epoch = self.iteration / self.order.iterations_per_epoch
        self.val_log.info("iteration %d  epoch %.2f  n %d  %s", self.iteration, epoch, len(rows), text)
        self.add_scalars("val", means)
        improved = means["standard/psnr"] > self.best_psnr
        self.best_psnr = max(means["standard/psnr"], self.best_psnr)
        return improved

    def test(self) -> None:
        """Translate the whole test list, each process its share, then judge the pictures as evaluate.py does."""
        folder = self.work_dir / "test"
        if self.is_main:  # whole folders are judged: pictures of an earlier, longer list must not count
            for name in ("results", "generated", "eo", "sar", "variance"):
                shutil.rmtree(folder / name, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        for batch, generated, sigma2 in self.translations(range(len(self.test_feeder)), "translating"):
            write_pictures(folder / "results", batch, generated, sigma2)
            write_images(folder, batch, generated, sigma2)
        self.accelerator.wait_for_everyone()
        if self.is_main:  # nobody waits for it: judging a large set takes longer than a collective may
            maps = folder / "variance" if (folder / "variance").is_dir() else None
            report = evaluate_folders(
                EvaluationFolders(folder / "generated", folder / "eo", folder / "sar", variance_dir=maps), folder,
                device=self.device, num_workers=self.config.num_worker, networks=self.config.lpips,
            )  # fmt: skip
            self.val_log.info("test  n %d  %s", report["images"], json.dumps(report["means"]["standard"]))
            print((folder / "report.md").read_text(encoding="utf-8"))

    def evaluate(self, indices: range, folder: Path) -> list[dict]:
        """Translate test pairs, each process its share => one row of metrics per pair, in list order, on all processes.

        A picture per pair (SAR, EO, generated EO, confidence) goes to `folder`.
        """
        rows = []
        for batch, generated, sigma2 in self.translations(indices, "validating"):
            rows += utils.image_rows(batch["name"], self.metrics(generated, batch["eo"]))
            write_pictures(folder, batch, generated, sigma2)
        names = self.test_feeder.names
        place = {names[index]: index for index in indices}
        return sorted(gather_object(rows), key=lambda row: place[row["name"]])

    def translations(self, indices: range, what: str):
        """This process's share of test pairs, a batch at a time: (batch, generated [B, 3, H, W], σ² [B, 1, h, w] or None)."""
        translator = self.translator().to(self.device).eval()
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        loader = DataLoader(
            Subset(self.test_feeder, mine),
            self.config.test_batch_size,
            num_workers=self.config.num_worker,
            worker_init_fn=in_a_group_of_its_own,
        )
        batches = self.batches(loader)
        share = math.ceil(len(indices) / self.accelerator.num_processes)  # the first process's, none has more
        rounds = range(math.ceil(share / self.config.test_batch_size))
        with fsdp.gathered(translator):
            for _ in tqdm(rounds, desc=what, unit="batch", disable=not self.is_main, leave=False, mininterval=1):
                if self.config.phase == "train":
                    self.signals.stop_if_asked()
                if (batch := next(batches, None)) is None:
                    continue
                with self.accelerator.autocast():
                    generated, sigma2 = translate(
                        translator, self.vae, self.scheduler, batch["sar"].to(self.device), self.starting_noise(batch),
                        self.prompt_embedding, self.config.num_inference_steps,
                    )  # fmt: skip
                if not generated.isfinite().all():
                    where = f"iteration {self.iteration}: " if self.config.phase == "train" else ""
                    raise UserError(f"{where}the generated images are not finite; {self.last_good()}")
                yield batch, generated, sigma2
        if self.config.phase == "train":
            translator.to(self.ema_device if translator is self.ema_unet else self.device)
            self.unet.train()

    def starting_noise(self, batch: dict) -> torch.Tensor:
        """The noise [B, C, h, w] that test.py would give these images with the run's seed."""
        images = batch["sar_pixels"].numpy() if "sar_pixels" in batch else to_uint8(batch["sar"])  # other feeders: 8-bit data
        return image_noise(self.vae, self.config.seed, images)

    def translator(self):
        """The U-Net to judge: the average where one is kept, without the distributed wrapper."""
        return getattr(self, "ema_unet", None) or self.accelerator.unwrap_model(self.unet)

    @cached_property
    def metrics(self) -> utils.PairMetrics:
        metrics = utils.PairMetrics(self.device, with_lpips=self.config.lpips)
        for name, reason in metrics.absent.items():
            self.val_log.info("%s is left out: %s", name, reason)
        return metrics


class LogWindow:
    """Sums since the last log line, kept on the device so that training does not wait for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.steps, self.parts, self.learning_rate = 0, 0, 0.0
        self.steps_here, self.started = 0, time.monotonic()  # for the speed: a resumed run's window began in another process
        self.loss = torch.zeros((), device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.sigma2 = torch.zeros(2, 4, device=self.device)  # (sum, count) by quarter of the timesteps

    def add(
        self, parts: list[tuple], grad_norm: torch.Tensor, learning_rate: float, blocked: torch.Tensor, num_train_timesteps: int
    ) -> None:
        """One step: (loss, timesteps [B], mean σ² [B] or None) of each micro-batch, and what they led to.

        The sums leave out a step that is `blocked`, a flag on the device; `leave_out_a_step` is to follow for the counts.
        """
        self.steps += 1
        self.steps_here += 1
        self.parts += len(parts)
        self.learning_rate = learning_rate
        self.grad_norm += torch.where(blocked, 0, grad_norm)
        for loss, timesteps, sigma2 in parts:
            self.loss += torch.where(blocked, 0, loss)
            if sigma2 is not None:
                quarter = timesteps * 4 // num_train_timesteps  # [B]
                self.sigma2.index_add_(1, quarter, torch.where(blocked, 0, torch.stack([sigma2, torch.ones_like(sigma2)])))

    def leave_out_a_step(self, micro_steps: int) -> None:
        self.steps -= 1
        self.steps_here -= 1
        self.parts -= micro_steps

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the window and all processes, and the last step's lr; σ² only for the quarters that were drawn."""
        loss, grad_norm, sigma2 = (accelerator.reduce(value, "mean") for value in (self.loss, self.grad_norm, self.sigma2))
        values = {"loss": loss.item() / self.parts, "grad_norm": grad_norm.item() / self.steps, "lr": self.learning_rate}
        names = ("sigma2_t0-25%", "sigma2_t25-50%", "sigma2_t50-75%", "sigma2_t75-100%")
        return values | {name: total / count for name, total, count in zip(names, *sigma2.tolist(), strict=True) if count}

    def state(self) -> dict:
        """What a checkpoint keeps, so that the first log line after a resume is that of a run in one go."""
        sums = {name: getattr(self, name).cpu() for name in ("loss", "grad_norm", "sigma2")}
        return {"steps": self.steps, "parts": self.parts, "learning_rate": self.learning_rate, **sums}

    def restore(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.device) if isinstance(value, torch.Tensor) else value)


def copy_of(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """In bfloat16 with channels last, to be trained."""
    memory_format = torch.channels_last if weight.dim() == 4 else torch.preserve_format
    return torch.nn.Parameter(weight.detach().to(torch.bfloat16, memory_format=memory_format))


def check_compiler(device: torch.device) -> None:
    """torch.compile writes C++ for CPUs."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise UserError("torch_compile: found no C++ compiler, expected g++ or clang++ on the PATH, or torch_compile: false")


class LoaderFault(UserError):
    """A batch that cannot be had: a file is gone or damaged, or a loader process died. The training itself is whole."""


class StopSignals:
    """SIGTERM and SIGINT, from schedulers and Ctrl-C: the first asks the run to save and end, a second ends it at once."""

    def __init__(self, num_processes: int):
        self.received, self.first_s = 0, 0.0
        # On CPUs, so that asking the other processes waits for no GPU.
        self.group = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _) -> None:
        if not self.received:
            self.received, self.first_s = number, time.monotonic()
            os.write(2, b"\nsaving and ending; once more ends at once\n")  # print could be in the middle of a line
        elif self.group is None or time.monotonic() > self.first_s + ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stop_if_asked(self) -> None:
        """Raise Stopped where a signal has come, to any of the processes: all of them learn of it here."""
        received = torch.tensor(self.received)
        if self.group is not None:
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, self.group)
        if received:
            self.received = received.item()
            raise Stopped(self.name())

    def name(self) -> str:
        return f"by {signal.Signals(self.received).name}"


def in_a_group_of_its_own(_: int) -> None:
    """For a loader process: Ctrl-C and group signals are the trainer's affair, whose last iteration still needs its batches.

    Its parent can still end it, which PyTorch does when the loader goes.
    """
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def write_pictures(folder: Path, batch: dict, generated: torch.Tensor, sigma2: torch.Tensor | None) -> None:
    """One side-by-side picture per pair."""
    generated = generated.cpu()
    size = tuple(generated.shape[-2:])
    confidence = confidence_map(sigma2.cpu(), size) if sigma2 is not None else None
    for index, name in enumerate(batch["name"]):
        images, titles = [batch["sar"][index], batch["eo"][index], generated[index]], ["SAR", "EO", "generated EO"]
        if confidence is not None:
            images, titles = [*images, confidence[index]], [*titles, "confidence"]
        write_png(folder / f"{name}.png", utils.panel(images, titles))


def write_images(folder: Path, batch: dict, generated: torch.Tensor, sigma2: torch.Tensor | None) -> None:
    """generated/, eo/ and sar/ as PNG and, with σ², variance/ as TIFF: the folders that evaluate.py reads."""
    maps = None if sigma2 is None else variance_map(sigma2.cpu(), tuple(generated.shape[-2:]))
    for index, name in enumerate(batch["name"]):
        for kind, images in (("generated", generated), ("eo", batch["eo"]), ("sar", batch["sar"])):
            write_png(folder / kind / f"{name}.png", to_uint8(images[index]))
        if maps is not None:
            write_tiff(folder / "variance" / f"{name}.tif", maps[index, 0].numpy())


def text_log(file: Path, is_main: bool) -> logging.Logger:
    """A plain text log that also speaks on the console, on the main process alone."""
    logger = logging.getLogger(str(file.resolve()))
    logger.setLevel(logging.INFO if is_main else logging.CRITICAL)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    if is_main:
        for handler in (LogFile(file, encoding="utf-8"), TqdmHandler()):
            handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)
    return logger


class LogFile(logging.FileHandler):
    """Tells of a full disk as any file does, where `logging` would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class TqdmHandler(logging.Handler):
    """Prints a line without tearing the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
