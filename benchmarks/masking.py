"""What masking and tokenising cost of a pretraining step.

    python benchmarks/masking.py --json masking.json

Timed are choosing the hidden tokens, gathering the voxels of all tokens, and weighing the hidden ones: what a step does
that a model on ready-made tokens would not; then decoding int8, which every reader of shards does; then the whole step
of the engine. The budget is 5 % of a step.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from _measure import Row, arguments_of, cpu_seconds, report
from _task import Workload, geometry_of, packed_task, stored_batches, train_config

from data_sharding.read.batch import WindowBatch, decode
from pretrain.masked.masked_volumes import MaskedVolumes, take_tokens
from training.engine.base import Engine
from training.engine.engines import make_engine

BUDGET = 0.05


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "small"])
    parser.add_argument("--maskings", nargs="+", default=["random", "tube", "future", "region"])
    parser.add_argument("--spacing-mm", type=float, default=4.0)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for model in arguments.models:
        for masking in arguments.maskings if model == arguments.models[0] else ["region"]:
            load = Workload(model, arguments.spacing_mm, 20, 4, 6, arguments.micro_batch, masking, 0.5)
            rows.append({"model": model, "masking": masking} | shares(load, arguments.repetitions))
    report(
        "Masking and tokenising",
        {"Shares of a step": rows},
        repetitions=arguments.repetitions,
        json_path=arguments.json,
    )


def shares(load: Workload, repetitions: int) -> Row:
    """The parts of a step in ms, and masking and tokenising as its share."""
    geometry = geometry_of(load)
    task = packed_task(load, geometry, load.micro_batch)
    config = train_config("plain", precision="fp32", compiles=False, recomputes=False)
    engine = make_engine(task, config, num_micro_batches=1)
    stored = next(stored_batches(load, geometry.space.num_voxels, pinned=False))
    batch = stored.to("cpu")
    contenders: dict[str, Callable[[], object]] = {
        "choosing": lambda: task.set_named("").masker.choose(batch.sample_seed),
        "masking + tokenising": lambda: tokenised(task, batch),
        "decoding int8": lambda: decode(stored.stored),
        "step": lambda: step(engine, batch),
    }
    seconds = cpu_seconds(contenders, repetitions=repetitions)
    share = seconds["masking + tokenising"] / seconds["step"]
    found: Row = {f"{name}, ms": 1000 * taken for name, taken in seconds.items()}
    return found | {"share of the step": share, "within 5 %": "yes" if share <= BUDGET else "no"}


def tokenised(task: MaskedVolumes, batch: WindowBatch) -> None:
    """Everything a step does between decoded windows and the encoder's input, and between its output and the loss."""
    masked = task.mask(batch)
    take_tokens(masked.features, masked.choice.visible)
    take_tokens(masked.features, masked.choice.hidden)
    take_tokens(masked.error_scale(masked.set.root_weight), masked.hidden_patch)


def step(engine: Engine, batch: WindowBatch) -> None:
    """One update."""
    engine.begin(0)
    engine.backward(engine.losses(batch)["loss"])
    engine.step()


if __name__ == "__main__":
    main()
