"""What a node is busy with is measured between two reports, once a host, and left out where nobody knows it."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from training.collectives import Process
from training.watch import system_metrics
from training.watch.system_metrics import NAMES, Nodes


def test_a_node_reports_what_it_did_since_the_last_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics.socket, "gethostname", lambda: "node-a")
    counters = iter([(1e6, 5e6), (3e6, 6e6)])  # bytes sent and received, at the start and one report later
    network = psutil.net_io_counters()
    monkeypatch.setattr(
        psutil,
        "net_io_counters",
        lambda: network._replace(**dict(zip(("bytes_sent", "bytes_recv"), next(counters), strict=True))),
    )
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)  # as in some containers
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(system_metrics.time, "monotonic", lambda: next(clock))
    found = Nodes(str(tmp_path / "scratch"), torch.device("cpu")).report()
    assert found["system/node-a/network_sent_mb_per_s"] == pytest.approx(0.5)
    assert found["system/node-a/network_received_mb_per_s"] == pytest.approx(0.25)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 1024**3
    assert found["system/node-a/scratch_free_gib"] == pytest.approx(free, rel=0.05)
    assert 0 < found["system/node-a/memory_used_gib"] < psutil.virtual_memory().total / 1024**3
    unknown = {"disk_read_mb_per_s", "disk_written_mb_per_s", "gpu_percent", "gpu_memory_used_gib"}
    assert set(found) == {f"system/node-a/{name}" for name in set(NAMES) - unknown}


def test_a_gpu_that_does_not_tell_is_left_out_and_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a part of a GPU (MIG) does not say how busy it is."""

    class NVMLError(Exception):
        pass

    def refuse(*arguments: object) -> None:
        raise NVMLError("Not Supported")

    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 1)
    nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetUtilizationRates = lambda index: index, refuse
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(system_metrics.importlib.util, "find_spec", lambda name: nvml)
    nodes = Nodes(str(tmp_path), torch.device("cpu"))
    nodes.nvml = system_metrics.nvml_handles()
    assert len(nodes.nvml) == 1
    assert not any("gpu" in name for name in nodes.report())
    nvml.nvmlInit = refuse
    assert system_metrics.nvml_handles() == []


def test_ranks_of_one_host_report_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["a", "a", "b", "b"]
    monkeypatch.setattr(system_metrics, "gather", lambda host: hosts)
    reports = []
    for rank in range(4):
        monkeypatch.setattr(system_metrics, "this_process", lambda rank=rank: Process(rank, 4))
        nodes = Nodes(str(tmp_path), torch.device("cpu"))
        reports.append(nodes.is_reporting)

        def gathered(mine: list[float], device: torch.device, rank: int = rank) -> np.ndarray:
            assert all(map(math.isnan, mine)) == (rank in (1, 3))
            return np.array([[row + 10.0 * column for column in range(len(NAMES))] for row in range(4)])

        monkeypatch.setattr(system_metrics, "gather_numbers", gathered)
        found = nodes.report()
        assert found["system/a/cpu_percent"] == 0
        assert found["system/b/memory_used_gib"] == 12
        assert len(found) == 2 * len(NAMES)
    assert reports == [True, False, True, False]
