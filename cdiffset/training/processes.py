"""The processes of a run: the accelerator that places each on its device, and the signals that ask all of them to stop."""

import os
import signal
import sys
import time
from importlib.util import find_spec

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from cdiffset.config import AUTOCAST_TYPE, Config
from cdiffset.device import be_deterministic, keep_freed_memory
from cdiffset.errors import Stopped, UserError

ECHO_S = 5  # launchers pass on a signal that the processes have received themselves
SINGLE_PROCESS = (  # what `accelerate launch --num_processes 2` starts without two GPUs, without a message
    "note: accelerate launch started one process only; for several on CPUs add --multi_gpu, or use torchrun --nproc-per-node"
)
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}  # fmt: skip


def make_accelerator(config: Config) -> Accelerator:
    """What places this process on its device among the others, set to compute as the configuration says.

    `batches.ResumableBatchSampler` deals out the batches, so Accelerate prepares the U-Net and the optimizer and nothing else.
    """
    if sharding := [name for variable, name in SHARDING.items() if os.environ.get(variable, "").lower() in ("1", "true")]:
        raise UserError(
            f"accelerate launch: expected plain data parallelism, found {sharding[0]}, which Accelerate leaves out on CPUs and "
            "whose checkpoints would be parts. Launch without it and set fsdp: true, which divides the model everywhere"
        )
    if config.report_to == "wandb" and find_spec("wandb") is None:
        raise UserError("report_to: wandb is not installed: pip install wandb, or take report_to: tensorboard")
    try:
        # `cpu` also tells a launcher's processes to communicate by gloo where there is no GPU.
        accelerator = Accelerator(
            mixed_precision=AUTOCAST_TYPE.get(config.mixed_precision, config.mixed_precision),
            cpu=not torch.accelerator.is_available(),
            dynamo_backend="no",  # torch_compile compiles, and Accelerate would once more where its launcher was told to
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=config.work_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # one copy of the gradients, not two
        )
    except ValueError as error:
        raise UserError(f"mixed_precision: {config.mixed_precision} is not available on this machine ({error})") from error
    if accelerator.num_processes == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        print(SINGLE_PROCESS, file=sys.stderr)
    if config.fsdp and config.phase == "train" and accelerator.num_processes == 1:
        raise UserError("fsdp: divides the model among processes, expected several, found 1: launch more, or fsdp: false")
    if not config.fsdp:  # under which weights come and go all the time, and what is kept in between only grows
        keep_freed_memory(accelerator.device)
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32" if config.tf32 else "ieee"
    if config.phase == "train":
        be_deterministic(config.deterministic, accelerator.device)
    return accelerator


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
