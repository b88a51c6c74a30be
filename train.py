"""The Trainer: config -> feeder -> latents -> U-Net -> loss, and validation. `fit` is the loop, `step` what it repeats."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

import utils
from cdiffset import checkpoint
from cdiffset.config import BEST_METRICS, Config
from cdiffset.errors import Stopped, UserError, message_of
from cdiffset.hub import Found, find_checkpoint
from cdiffset.losses import training_loss
from cdiffset.model import check_base, load_unet
from cdiffset.pipeline import encode
from cdiffset.training.batches import (
    NOISE,
    LoaderFault,
    ResumableBatchSampler,
    batches_of,
    data_record,
    loader_options,
    seeded,
    train_loader,
)
from cdiffset.training.latent_cache import Encoder, LatentCache
from cdiffset.training.logs import LogWindow, start_tracking
from cdiffset.training.networks import check_crops, load_networks
from cdiffset.training.processes import StopSignals, make_accelerator
from cdiffset.training.state import RunFolder, RunState, report_resume
from cdiffset.training.validation import NotFinite, Validator
from cdiffset.training.weights import TrainedWeights
from feeders.feeder import build_feeder


class Trainer:
    """Builds every part of a run from its configuration, what may be refused as early as it can be known."""

    def __init__(self, config: Config):
        self.config = config
        self.accelerator = make_accelerator(config)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        check_base(config.pretrained_model_name_or_path)
        self.test_feeder, self.train_feeder = (build_feeder(config, which) for which in ("test", "train"))
        self.folder = RunFolder(config, self.accelerator, data_record(self.train_feeder, config.train_feeder_args))
        resume_from = self.folder.agree_on_resume()
        self.logs = self.folder.open()
        option, start, path = "accelerator_path", None, config.accelerator_path
        if resume_from:
            option, start = "resume", Found(resume_from / "unet")
        elif path:
            start = find_checkpoint(path, option)
        networks = load_networks(config, self.accelerator, start, option, self.logs.train)
        self.vae, self.scheduler, self.prompt_embedding, unet = networks
        check_crops(self.vae, {"train": self.train_feeder, "test": self.test_feeder})
        self.cache = None
        if config.latent_cache:
            self.cache = LatentCache(Path(config.latent_cache), self.train_feeder, self.vae, self.logs.train.info)
        self.state = self.begin_or_resume(unet, resume_from, start and start.source)
        self.weights, self.window = self.state.weights, self.state.window
        self.saved = self.state.iteration  # the latest iteration that is on the disk
        self.validator = Validator(config, self.accelerator, self.test_feeder, networks, self.logs)
        self.validator.require(config.best_metric)
        self.sampler = ResumableBatchSampler(
            len(self.train_feeder), config, self.state.iteration, self.accelerator.process_index, self.accelerator.num_processes
        )
        self.signals = StopSignals(self.accelerator.num_processes)

    def begin_or_resume(self, unet, resume_from: Path | None, source: str | None) -> RunState:
        average = None
        if resume_from and self.config.ema_decay and (resume_from / "unet_ema").is_dir():
            base, latent_channels = self.config.pretrained_model_name_or_path, self.vae.config.latent_channels
            average, _ = load_unet(
                str(resume_from / "unet_ema"), base, latent_channels, "resume", is_verified=True, merge=False
            )
        measure = getattr(self.train_feeder, "sar_statistics", None)  # a feeder of another origin may have none
        facts = {
            "started_from": checkpoint.read_meta(resume_from).get("started_from") if resume_from else source,
            "gsd_m": getattr(self.train_feeder, "gsd_m", None),
            "sar_statistics": measure() if measure and self.is_main else None,
            "radiometry": getattr(self.train_feeder, "radiometry", {}),
        }
        weights = TrainedWeights(unet, self.config, self.accelerator, average)
        state = RunState(weights, self.prompt_embedding, LogWindow(self.device), facts)
        if resume_from:
            saved, meta = checkpoint.read_state(resume_from)
            try:
                state.restore(saved, meta, self.accelerator, self.config.best_metric)
            except (KeyError, ValueError) as error:
                raise UserError(
                    f"resume: the optimizer state of {resume_from} does not fit this configuration: {error}"
                ) from error
            report_resume(self.folder, resume_from, meta, self.logs.train.info)
        return state

    # --------------------------------------------------------------------------------------------------------- the loop
    def run(self) -> None:
        """`fit`, and where it ends early, a checkpoint of what is done so far."""
        try:
            with self.signals:
                start_tracking(self.accelerator, self.config, self.state.iteration)
                try:
                    self.fit()
                except (Stopped, LoaderFault) as reason:
                    self.end_early(reason)
            self.accelerator.end_training()  # threads of gloo that outlive the interpreter abort the process
        except OSError as error:  # a full disk, first of all; the feeders report faults of their own files
            where = f"cannot write into {self.folder.path}: {error.strerror or error}"
            raise UserError(f"{where}; {self.folder.last_good()}") from error

    def end_early(self, reason: Stopped | LoaderFault) -> NoReturn:
        """Save what is done so far, and say how to go on."""
        together = isinstance(reason, Stopped)  # a fault of one process finds the others in the middle of something
        if self.state.iteration > self.saved and (together or self.accelerator.num_processes == 1):
            self.save(["latest"])
        if together:
            self.accelerator.end_training()
        if self.signals.received:  # some schedulers signal the loader processes as well
            name = self.signals.name()
            raise Stopped(f"{name}; {self.folder.last_good()}; the same command continues") from None
        done = f"stopped after iteration {self.state.iteration}; {self.folder.last_good()}"
        raise UserError(f"{reason}; {done}") from None

    def fit(self) -> None:
        """Train to num_iter, validating and saving on the way."""
        config, state = self.config, self.state
        bar = tqdm(
            total=config.num_iter, initial=state.iteration, desc="training", unit="it", disable=not self.is_main, mininterval=1
        )
        with bar:  # closed also by an error, whose message then has a line of its own
            if state.unfinished:
                self.validate_and_save()
            batches = self.batches()
            while state.iteration < config.num_iter:
                self.signals.stop_if_asked()
                self.step(batches)
                state.iteration += 1
                state.unfinished = True
                bar.update()
                if state.iteration == config.num_iter or state.iteration % config.log_iter == 0:
                    self.log(bar)
                paused = time.monotonic()
                self.validate_and_save()
                self.window.pause(paused)  # images/s are those of training alone
        best = "not measured" if state.best is None else f"{state.best:.4g}"
        self.logs.train.info("finished: %d iterations, best %s %s", state.iteration, config.best_metric, best)

    def step(self, batches: Iterator[dict]) -> None:
        """One optimizer step on one batch, in gradient_accumulation_steps parts."""
        parts, names, micro_steps = [], [], self.sampler.micro_steps
        for micro, batch in enumerate(islice(batches, micro_steps)):
            names += batch["name"]
            z_sar, z_eo = self.latents_of(batch)
            if micro == 0:
                noise, timesteps = self.draw_noise(z_eo.shape[1:])
            mine = self.sampler.part(micro)
            with self.weights.accumulating(last=micro == micro_steps - 1):
                with self.accelerator.autocast():
                    loss, sigma2 = training_loss(
                        self.weights.network, self.scheduler, z_sar, z_eo, noise[mine], timesteps[mine], self.prompt_embedding,
                        self.config.beta,
                    )  # fmt: skip
                self.accelerator.backward(loss / micro_steps)
            parts.append((loss.detach(), timesteps[mine], sigma2))
        grad_norm = self.weights.gradient_norm()
        if self.is_finite(parts, grad_norm, names):
            self.window.add(parts, grad_norm, self.weights.learning_rate, self.scheduler.config.num_train_timesteps)
            self.weights.step(grad_norm, self.state.iteration)
        else:
            self.weights.leave_out_step()
        self.weights.end_step()

    # ------------------------------------------------------------------------------------------------------ parts of a step
    def batches(self) -> Iterator[dict]:
        """Of the rest of the run: images, or cached latents, which are written first where they are missing."""
        rank, pairs = self.accelerator.process_index, self.train_feeder
        if self.cache:
            paused = time.monotonic()
            pairs = self.cached_pairs()
            self.window.pause(paused)
        yield from batches_of(train_loader(pairs, self.sampler, self.config, self.device, rank))

    def cached_pairs(self):
        def load(views, batch_size: int) -> Iterator[dict]:
            return batches_of(torch.utils.data.DataLoader(views, batch_size, **loader_options(self.config, self.device)))

        size, stop = self.sampler.micro_batch_size, lambda: bool(self.signals.received)
        try:
            pairs = self.cache.open(Encoder(self.encode, load, size, stop, self.is_main))
        except UserError as error:
            raise LoaderFault(message_of(error)) from error
        self.signals.stop_if_asked()
        return pairs

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] => latents [B, C, h, w] on the device.

        Contiguous whatever layout the VAE leaves, as the cache gives them: in another layout the U-Net rounds differently.
        """
        with torch.no_grad():
            return encode(self.vae, pixels.to(self.device, non_blocking=True)).contiguous()

    def latents_of(self, batch: dict) -> list[torch.Tensor]:
        """SAR and EO latents [B, C, h, w] of a batch of images or of cached latents."""
        if self.cache:
            return [batch[kind].to(self.device, non_blocking=True) for kind in ("z_sar", "z_eo")]
        return [self.encode(batch[kind]) for kind in ("sar", "eo")]

    def draw_noise(self, latent_shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise [batch, C, h, w] and timesteps [batch] of a whole batch, a function of (seed, iteration)."""
        generator, size = seeded(self.config.seed, NOISE, self.state.iteration), self.sampler.batch_size
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=generator)
        noise = torch.randn(size, *latent_shape, generator=generator)
        if self.device.type == "cuda":  # else the copy would wait for all that the GPU still has to do
            noise, timesteps = noise.pin_memory(), timesteps.pin_memory()
        return noise.to(self.device, non_blocking=True), timesteps.to(self.device, non_blocking=True)

    def is_finite(self, parts: list[tuple], grad_norm: torch.Tensor, names: list[str]) -> bool:
        """Whether a step may be taken; ends the run where more than skip_nonfinite may not. All processes decide alike.

        Under fp16 the gradient overflows now and then: the scaler leaves those steps out, and only the loss counts here.
        """
        is_scaled = self.accelerator.scaler is not None
        if not is_scaled and torch.isfinite(grad_norm):  # the norm is the same in all processes
            return True
        loss = self.accelerator.reduce(sum(loss for loss, *_ in parts) / len(parts), "mean")
        if is_scaled and torch.isfinite(loss):
            return True
        timesteps = torch.cat([timesteps for _, timesteps, _ in parts]).tolist()
        diagnosis = (
            f"iteration {self.state.iteration + 1}: the gradient norm is {grad_norm.item()} and the loss {loss.item():.4g}, "
            f"at timesteps {gather_object(timesteps)}, for {', '.join(gather_object(names))}"
        )
        self.state.skipped += 1
        if self.state.skipped > self.config.skip_nonfinite:
            unchanged = "the weights are as before this step and were not saved"
            raise UserError(f"{diagnosis}; {unchanged}; {self.folder.last_good()}")
        self.logs.train.info("step left out (%d of %d): %s", self.state.skipped, self.config.skip_nonfinite, diagnosis)
        return False

    def log(self, bar: tqdm) -> None:
        if not self.window.steps:  # every step was left out
            return
        values, iteration = self.window.read(self.accelerator, self.sampler.batch_size), self.state.iteration
        self.window.reset()
        epoch = iteration / self.sampler.iterations_per_epoch
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.logs.train.info("iteration %d/%d  epoch %.2f  %s", iteration, self.config.num_iter, epoch, text)
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_s']:.1f} images/s", refresh=False)
        self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=iteration)

    # ---------------------------------------------------------------------------------------------- validation and saving
    def validate_and_save(self) -> None:
        improved = self.validation_is_due() and self.validate()
        self.state.unfinished = False
        if names := self.checkpoint_names(improved):
            self.save(names)

    def validation_is_due(self) -> bool:
        """Every eval_epoch epochs, every epoch in the last part of training, and at the end."""
        config, iteration = self.config, self.state.iteration
        epoch, rest = divmod(iteration, self.sampler.iterations_per_epoch)
        if iteration == config.num_iter:
            return True
        late = iteration > config.eval_each_epoch_from * config.num_iter
        return rest == 0 and (late or (config.eval_epoch > 0 and epoch % config.eval_epoch == 0))

    def validate(self) -> bool:
        """Translate the first val_len test pairs => whether their mean best_metric is the best so far."""
        state, pictures = self.state, self.folder.path / "results" / f"iteration-{self.state.iteration:06d}"
        indices = range(min(self.config.val_len, len(self.test_feeder)))
        try:
            with self.weights.evaluated() as unet:
                rows = self.validator.rows(unet, indices, pictures, self.signals.stop_if_asked)
        except NotFinite as error:
            raise UserError(f"iteration {state.iteration}: {error}; {self.folder.last_good()}") from None
        means = utils.flat_means(rows)
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        epoch = state.iteration / self.sampler.iterations_per_epoch
        self.logs.val.info("iteration %d  epoch %.2f  n %d  %s", state.iteration, epoch, len(rows), text)
        self.accelerator.log({f"val/{name}": value for name, value in means.items()}, step=state.iteration)
        value, sign = means[f"standard/{self.config.best_metric}"], BEST_METRICS[self.config.best_metric]
        if state.best is not None and sign * value <= sign * state.best:
            return False
        state.best = value
        return True

    def checkpoint_names(self, improved: bool) -> list[str]:
        """The folders that are due now, the numbered one first; `latest` goes with any of them."""
        config, iteration, names = self.config, self.state.iteration, []
        if config.save_iter and iteration % config.save_iter == 0:
            names.append(f"checkpoint-{iteration}")
        epoch, rest = divmod(iteration, self.sampler.iterations_per_epoch)
        if config.save_epoch and rest == 0 and epoch % config.save_epoch == 0:
            names.append(f"epoch-{epoch}")
        if config.keep_at and iteration in config.keep_at:
            names.append(f"snapshot-{iteration}")
        if improved:
            names.append("best")
        return [*names, "latest"] if names or iteration == config.num_iter else []

    def save(self, names: list[str]) -> None:
        """Write the present state under each name (one set of files)."""
        self.state.save(self.folder, names, self.sampler.iterations_per_epoch)
        self.saved = self.state.iteration
