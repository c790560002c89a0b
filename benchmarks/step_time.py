"""How long a pretraining step takes, and what packing and dropping tokens gain over a dense grid.

    python benchmarks/step_time.py                                            # a laptop: tiny and small at 4 mm
    python benchmarks/step_time.py --device cuda --models small base --spacing-mm 2 --precision bf16 --micro-batch 16 \\
        --variants plain compiled recomputed compiled+recomputed dense --steps 30 --json step_time.json       # a GPU

A step is forward and backward passes over micro-batches, clipping and AdamW, by the engine that training uses; windows
come as int8 from host memory through a thread that keeps two ahead. Every variant runs in its own process. FLOPs are
counted from shapes (Task.cost: what is recomputed counts once); MFU is their rate over the device's dense bf16 peak in
configs/peaks. On a CPU a step's seconds are CPU seconds of one thread, on a GPU wall-clock seconds. Importable have to
be torch, numpy, einops, jaxtyping, PyYAML and, with --engine zero*, deepspeed; a test blocks the rest.
"""

import argparse
import json
import multiprocessing
import os
import queue
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from _dense_grid import DenseGrid
from _measure import Row, about, arguments_of, markdown
from _task import Workload, geometry_of, model_config, packed_task, peak_tflops, stored_batches, train_config

from data_sharding.read.batch import StoredBatch
from training.engine.engines import make_engine
from training.task import Cost

VARIANTS = ("plain", "compiled", "recomputed", "compiled+recomputed", "dense")
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """One variant, timed in a process of its own."""

    load: Workload
    variant: str
    engine: str
    precision: str
    num_steps: int
    num_warmup: int
    num_micro_batches: int


@dataclass(frozen=True)
class Timing:
    step_s: list[float]
    wait_share: float  # of the wall-clock seconds of these steps, for data
    cost: Cost  # of a step
    parameters: int
    peak_bytes: int
    device: str
    loss: float


def main() -> None:
    arguments = parsed()
    rows: list[Row] = []
    for model in arguments.models:
        load = Workload(
            model=model,
            spacing_mm=arguments.spacing_mm,
            window_frames=arguments.window_frames,
            tubelet_frames=arguments.tubelet_frames,
            patch_voxels=arguments.patch_voxels,
            micro_batch=arguments.micro_batch,
            masking=arguments.masking,
            hidden_share=arguments.hidden_share,
        )
        for variant in arguments.variants:
            job = Job(
                load=load,
                variant=variant,
                engine=arguments.engine,
                precision=arguments.precision,
                num_steps=arguments.steps,
                num_warmup=arguments.warmup,
                num_micro_batches=arguments.micro_batches,
            )
            rows.append(row_of(job, timing_of(job)))
            print(rows[-1], file=sys.stderr, flush=True)
    tables = {"Steps": rows, "Gain over the dense grid": gains(rows)}
    what = ", ".join(f"{key} {value}" for key, value in asdict(load).items() if key != "model")
    print(f"# Step time\n\n{about()}.\n{what}, {arguments.micro_batches} micro-batches.")
    for name, table in tables.items():
        print(f"\n## {name}\n\n{markdown(table)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"about": about(), "workload": what, "tables": tables}, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    parser = arguments_of(__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--models", nargs="+", default=["tiny", "small"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain", "recomputed", "dense"])
    parser.add_argument("--spacing-mm", type=float, default=4.0)
    parser.add_argument("--window-frames", type=int, default=20)
    parser.add_argument("--tubelet-frames", type=int, default=4)
    parser.add_argument("--patch-voxels", type=int, default=6)
    parser.add_argument("--masking", choices=["random", "tube", "region"], default="region")
    parser.add_argument("--hidden-share", type=float, default=0.5)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--engine", choices=["plain", "zero0", "zero1", "zero2", "zero3"], default="plain")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them: compilation, caches")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not on_gpu:
        parser.error("--device cuda, but torch sees no GPU")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return arguments


def timing_of(job: Job) -> Timing:
    """The timing of a job in a fresh process, so that its peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(timed, (job,))


def timed(job: Job) -> Timing:
    """Train for some steps and time each; runs in a process of its own."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    batch_size = job.load.micro_batch * job.num_micro_batches
    geometry = geometry_of(job.load)
    if job.variant == "dense":
        sizes = model_config(job.load.model).encoder
        task = DenseGrid(sizes, geometry, hidden_share=job.load.hidden_share, batch_size=batch_size)
    else:
        task = packed_task(job.load, geometry, batch_size)
    config = train_config(
        job.engine,
        precision=job.precision,
        compiles="compiled" in job.variant,
        recomputes="recomputed" in job.variant,
    )
    engine = make_engine(task, config, num_micro_batches=job.num_micro_batches)
    is_gpu = engine.device.type == "cuda"
    ahead = prefetched(stored_batches(job.load, geometry.space.num_voxels, pinned=is_gpu))
    seconds, waited, begun = [], 0.0, 0.0
    for step in range(job.num_steps + job.num_warmup):
        if step == job.num_warmup:
            waited, begun = 0.0, time.perf_counter()
        started = clock(is_gpu)
        engine.begin(step)
        for _ in range(job.num_micro_batches):
            asked = time.perf_counter()
            stored = next(ahead)
            waited += time.perf_counter() - asked
            losses = engine.losses(stored.to(engine.device))
            engine.backward(losses["loss"])
        engine.step()
        seconds.append(clock(is_gpu) - started)
    waited /= time.perf_counter() - begun
    loss = float(losses["loss"].detach())
    one = task.cost(stored)
    cost = Cost(one.tokens * job.num_micro_batches, one.flops * job.num_micro_batches)
    parameters = sum(parameter.numel() for parameter in task.parameters())
    engine.close()
    return Timing(seconds[job.num_warmup :], waited, cost, parameters, peak_bytes(is_gpu), device_name(is_gpu), loss)


def prefetched(batches: Iterator[StoredBatch]) -> Iterator[StoredBatch]:
    """The batches, made by a thread that keeps two ahead."""
    ready: queue.Queue[StoredBatch] = queue.Queue(maxsize=2)

    def fill() -> None:
        for batch in batches:
            ready.put(batch)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield ready.get()


def clock(is_gpu: bool) -> float:
    """Wall-clock seconds once the GPU is done; on a CPU the CPU seconds of this process, which load hardly changes."""
    if not is_gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(is_gpu: bool) -> int:
    """The most memory in use: allocated on the GPU, or resident in this process."""
    return torch.cuda.max_memory_allocated() if is_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_name(is_gpu: bool) -> str:
    return torch.cuda.get_device_name() if is_gpu else "CPU, 1 thread"


def row_of(job: Job, timing: Timing) -> Row:
    """What a timing says, as a row; the median step on a GPU, the least on a shared CPU."""
    is_gpu = timing.device.startswith("NVIDIA")
    step_s = statistics.median(timing.step_s) if is_gpu else min(timing.step_s)
    samples = job.load.micro_batch * job.num_micro_batches
    rate = timing.cost.flops / step_s / 1e12
    peak = peak_tflops(timing.device)
    return {
        "model": job.load.model,
        "variant": job.variant,
        "parameters": f"{timing.parameters:,}",
        "tokens a sample": timing.cost.tokens / samples,
        "GFLOP a sample": timing.cost.flops / samples / 1e9,
        "s a step": step_s,
        "slowest": max(timing.step_s),
        "samples/s": samples / step_s,
        "TFLOP/s": rate,
        "MFU": rate / peak if peak else "no peak known",
        "data-wait": timing.wait_share,
        "peak GiB": timing.peak_bytes / GIB,
        "loss": timing.loss,
    }


def gains(rows: list[Row]) -> list[Row]:
    """The packed model against the dense one of the same size, where both ran."""
    found: list[Row] = []
    for dense in (row for row in rows if row["variant"] == "dense"):
        packed = next((row for row in rows if row["model"] == dense["model"] and row["variant"] == "plain"), None)
        if packed is not None:
            found.append(
                {
                    "model": dense["model"],
                    "samples/s, packed over dense": float(packed["samples/s"]) / float(dense["samples/s"]),
                    "GFLOP a sample, dense over packed": float(dense["GFLOP a sample"])
                    / float(packed["GFLOP a sample"]),
                    "peak memory, dense over packed": float(dense["peak GiB"]) / float(packed["peak GiB"]),
                }
            )
    return found or [{"model": "none: --variants plain dense gives it"}]


if __name__ == "__main__":
    main()
