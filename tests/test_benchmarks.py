"""The step-time benchmark runs on a machine that has little more than torch, and what it times compiles whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = (
    "nibabel scipy nilearn ray mlflow hydra omegaconf pandas pyarrow sklearn webdataset isal matplotlib s3fs "
    "boto3 jinja2 rich beartype"
)
# Python finds it at the start of every process, those that the benchmark spawns included.
SITECUSTOMIZE = f"""
import sys
from importlib.machinery import PathFinder

class WithoutThem(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        left_out = name.partition(".")[0] in {set(LEFT_OUT.split())!r}
        return None if left_out else PathFinder.find_spec(name, path, target)

sys.meta_path = [WithoutThem if finder is PathFinder else finder for finder in sys.meta_path]
"""
COMPILED = """
import importlib.util, json, sys
sys.path[:0] = sys.argv[1:]
import torch
from _task import Workload, geometry_of, packed_task, peak_tflops, stored_batches
from step_time import Job, timed

load = Workload("tiny", 6.0, 4, 2, 6, 1, "region", 0.5)
timing = timed(Job(load, "plain", "plain", "fp32", num_steps=1, num_warmup=0, num_micro_batches=1))
geometry = geometry_of(load)
task = packed_task(load, geometry, 1)
batches = stored_batches(load, geometry.space.num_voxels, pinned=False)
compiled, losses = torch.compile(task, backend="eager", fullgraph=True), []
for _ in range(2):
    batch = next(batches).to("cpu")
    losses.append([float(one(batch)["loss"].detach()) for one in (compiled, task)])
print(json.dumps({
    "pandas": importlib.util.find_spec("pandas") is not None,
    "flops": timing.cost.flops,
    "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    "losses": losses,
    "peaks": [peak_tflops("NVIDIA H200"), peak_tflops("CPU, 1 thread")],
}))
"""


def test_a_step_is_timed_with_torch_alone_and_compiles_as_one_graph_with_the_same_loss(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    command = [sys.executable, "-c", COMPILED, str(ROOT / "benchmarks"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["pandas"]
    assert found["flops"] > 0
    assert found["graphs"] == 1
    assert all(compiled == plain for compiled, plain in found["losses"])
    assert found["peaks"] == [989.4, None]
