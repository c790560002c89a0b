"""What a second rank adds: samples a second of two ranks on two cores against one on one, the same batch.

    python benchmarks/scaling.py --json scaling.json

Each rank is a process pinned to a core of its own, with one thread, under DeepSpeed's ZeRO over gloo; nothing else of
the pipeline runs. One and two ranks take turns, and the least time of a step counts: on a shared machine the least is
what others disturbed least. CPU seconds of a rank would hide waiting for the other, so wall-clock time it is, and a
machine that is busy with other work cannot show two cores' worth: the load is printed beside.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed
from _measure import Row, about, arguments_of, markdown
from _task import Workload, geometry_of, packed_task, stored_batches, train_config

from training.engine.engines import make_engine

AIM = 1.7


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny"])
    parser.add_argument("--engines", nargs="+", default=["zero1", "zero2"])
    parser.add_argument("--spacing-mm", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step over all ranks")
    parser.add_argument("--steps", type=int, default=4, help="timed, of one turn")
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    loads = [os.getloadavg()[0]]
    rows: list[Row] = []
    for model in arguments.models:
        for engine in arguments.engines:
            load = Workload(model, arguments.spacing_mm, 20, 4, 6, 2, "region", 0.5)
            least = dict.fromkeys((1, 2), float("inf"))
            for _ in range(arguments.turns):
                for num_ranks in least:
                    taken = step_seconds(load, engine, num_ranks, arguments.batch, arguments.steps)
                    least[num_ranks] = min(least[num_ranks], taken)
                loads.append(os.getloadavg()[0])
            gain = least[1] / least[2]
            rows.append(
                {
                    "model": model,
                    "engine": engine,
                    "one rank, s a step": least[1],
                    "two ranks, s a step": least[2],
                    "gain": gain,
                    f"at least {AIM}": "yes" if gain >= AIM else "no",
                }
            )
    how = f"Wall-clock seconds, the least step of {arguments.turns} turns of {arguments.steps} steps"
    print(
        f"# Scaling\n\n{about()}.\n{how}; load while it ran {min(loads):.1f} to {max(loads):.1f}.\n\n{markdown(rows)}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"about": about(), "loads": loads, "rows": rows}, indent=1) + "\n")


def step_seconds(load: Workload, engine: str, num_ranks: int, batch: int, num_steps: int) -> float:
    """The least wall-clock seconds of a step, of ranks in processes of their own."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(num_ranks) as pool:
        jobs = [(load, engine, rank, num_ranks, batch, num_steps, f"{folder}/store") for rank in range(num_ranks)]
        return max(pool.starmap(ranked, jobs, chunksize=1))


def ranked(load: Workload, engine: str, rank: int, num_ranks: int, batch: int, num_steps: int, store: str) -> float:
    """One rank's least step, after one that is not timed."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, num_ranks), rank=rank, world_size=num_ranks
    )
    geometry = geometry_of(load)
    num_micro_batches = batch // (num_ranks * load.micro_batch)
    config = train_config(engine, precision="fp32", compiles=False, recomputes=False)
    running = make_engine(packed_task(load, geometry, batch), config, num_micro_batches=num_micro_batches)
    batches = stored_batches(load, geometry.space.num_voxels, pinned=False)
    seconds = []
    for step in range(num_steps + 1):
        torch.distributed.barrier()
        started = time.perf_counter()
        running.begin(step)
        for _ in range(num_micro_batches):
            running.backward(running.losses(next(batches).to(running.device))["loss"])
        running.step()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
