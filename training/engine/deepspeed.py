"""DeepSpeed ZeRO 0-3 behind the calls of training.engine.base.Engine. Imported only when a run asks for it."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn

from training.collectives import this_process
from training.config import TrainConfig
from training.engine.base import autocast, norms_of_groups, own_device, poisoned
from training.engine.optimizer import begin_update, learning_rate_at, make_optimizer
from training.engine.zero_state import WHOLE, load_whole
from training.errors import CheckpointError
from training.plateau import NOTHING_WATCHED, Watched, opening_step
from training.task import Batch, Task
from training.unfreezing import checked_groups

TAG = "state"
BUCKET_ELEMENTS = 50_000_000  # of gradients, float32: DeepSpeed's default sets aside 2 GB for a model of any size

# DeepSpeed 0.19 calls collectives torch 2.13 has renamed, several times per step; the warning names torch's own module.
RENAMED = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"


def leave_process_group() -> None:
    """Called when the process ends, not the engine: DeepSpeed keeps the groups it made first, and a process may train
    more than once. Without it a rank may abort at exit ("terminate called without an active exception")."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_deepspeed(device: torch.device) -> None:
    """Make DeepSpeed use the existing process group, or a new one of a single rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise compiled with a C++ compiler at start
    warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
    deepspeed.logger.setLevel("WARNING")
    os.environ.setdefault("LOCAL_RANK", "0")  # set by whoever launches several ranks; DeepSpeed insists on it
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    atexit.register(leave_process_group)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def deepspeed_settings(config: TrainConfig, *, num_micro_batches: int) -> dict[str, object]:
    """DeepSpeed's own configuration. Its batch sizes mean nothing: the source sets them, losses are in sum form."""
    stage = config.engine.zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": config.optimizer.clip_norm if stage > 0 else 0.0,  # stage 0: clipped in `step`
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET_ELEMENTS},
        "torch_autocast": {
            "enabled": config.engine.precision == "bf16",
            "dtype": "bfloat16",
            # Which products are bf16 is torch's to say; these are the modules whose gradients DeepSpeed would also add
            # up over ranks in bf16, rounding at every rank (measured: 5e-5 of the norm at two ranks, 1e-7 in float32).
            "lower_precision_safe_modules": [],
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }


class DeepSpeedEngine:
    def __init__(self, task: Task, config: TrainConfig, *, num_micro_batches: int) -> None:
        self.device = own_device()
        start_deepspeed(self.device)
        import deepspeed

        self.config = config
        self.stage = config.engine.zero_stage
        self.runs_in_lockstep = self.stage == 3
        self.task = task.to(self.device)
        self.groups = checked_groups(task)
        self.num_micro_batches = num_micro_batches
        self.num_backward = 0
        self.optimizer = make_optimizer(self.groups, config, self.device)
        self.deepspeed, *_ = deepspeed.initialize(
            model=task,
            optimizer=self.optimizer,
            config=deepspeed_settings(config, num_micro_batches=num_micro_batches),
            dist_init_required=False,
        )

    def begin(self, step: int, watched: Watched = NOTHING_WATCHED) -> float:
        rate = learning_rate_at(self.config, step, watched)
        for index, group in enumerate(self.groups):
            if 0 < step == opening_step(group.opens_at, watched):
                self._restart_moments(index)
        begin_update(self.task, self.optimizer, self.groups, rate=rate, step=step, watched=watched)
        return rate

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.deepspeed(batch)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the number of micro-batches and averages over ranks: a sum is wanted.
        self.deepspeed.backward(poisoned(loss) * (this_process().world_size * self.num_micro_batches))
        self.num_backward += 1
        if self.num_backward < self.num_micro_batches:
            self.deepspeed.step()  # only counts; the update happens at the last micro-batch

    def group_norms(self) -> dict[str, float]:
        if self.stage == 0:
            return norms_of_groups(self.groups, lambda parameter: parameter.grad)
        from deepspeed.utils import safe_get_full_grad

        return norms_of_groups(self.groups, lambda each: safe_get_full_grad(each) if each.requires_grad else None)

    def step(self) -> float:
        self.num_backward = 0
        if self.stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self.task.parameters(), self.config.optimizer.clip_norm))
            if math.isfinite(norm):
                self.deepspeed.step()
            return norm
        self.deepspeed.step()
        if self.deepspeed.optimizer.overflow:  # ZeRO found a gradient that is not finite and skipped the update
            return math.nan
        return float(self.deepspeed.get_global_grad_norm())

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        with self._gathered(list(self.task.parameters(recurse=False))), autocast(self.config.engine, self.device):
            return self.task.predict(batch)

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        with self._gathered(list(self.task.parameters())):
            yield

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.deepspeed.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        if (folder / WHOLE).exists():
            load_whole(self.deepspeed, self.task, folder / WHOLE)
            return
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(f"{folder} was not written by DeepSpeed; resume with the engine that wrote it")

    def close(self) -> None:
        self.deepspeed.destroy()

    def _gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        if self.stage < 3 or not parameters:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)

    def _restart_moments(self, index: int) -> None:
        """Set the step count of a group to 0: ZeRO counted while the group was closed, and a bias correction for many
        steps applied to fresh moments would make its first updates several times too large."""
        if self.stage == 3:
            zero = self.deepspeed.optimizer
            owners = enumerate(zero.fp32_partitioned_groups_flat)
            flat = [tensor for number, tensor in owners if zero.sub_group_to_group_id[number] == index]
        else:
            flat = self.optimizer.param_groups[index]["params"]
        for tensor in flat:
            if "step" in self.optimizer.state[tensor]:
                self.optimizer.state[tensor]["step"].zero_()
