"""How busy every node of a run is, sampled by its first rank and gathered at tracking steps.

Between two reports nothing runs: no thread, no server. Keys are system/<host>/<name>; ranks of one host report once.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import socket
import time
from pathlib import Path

import psutil
import torch

from training.collectives import gather, gather_numbers, this_process

GIB = 1024**3
NAMES = (
    "cpu_percent",
    "memory_used_gib",
    "scratch_free_gib",
    "disk_read_mb_per_s",
    "disk_written_mb_per_s",
    "network_sent_mb_per_s",
    "network_received_mb_per_s",
    "gpu_percent",  # mean over the node's GPUs; these two only where pynvml is installed
    "gpu_memory_used_gib",
)


class Nodes:
    """The nodes of a run; every rank makes one and calls `report` at the same steps."""

    def __init__(self, scratch: str, device: torch.device) -> None:
        hosts = [str(host) for host in gather(socket.gethostname())]
        self.rank_of_host = {host: hosts.index(host) for host in hosts}
        Path(scratch).mkdir(parents=True, exist_ok=True)
        self.scratch = scratch
        self.device = device
        self.nvml = nvml_handles() if device.type == "cuda" and self.is_reporting else None
        psutil.cpu_percent()  # counts from here
        self.last = self._counters()

    @property
    def is_reporting(self) -> bool:
        """True on the first rank of each host."""
        return this_process().rank in self.rank_of_host.values()

    def report(self) -> dict[str, float]:
        """What every node did since the last report, on every rank, without what is unknown there."""
        mine = self._sample() if self.is_reporting else [math.nan] * len(NAMES)
        ranks = gather_numbers(mine, self.device)
        return {
            f"system/{host}/{name}": float(ranks[rank, column])
            for host, rank in sorted(self.rank_of_host.items())
            for column, name in enumerate(NAMES)
            if not math.isnan(ranks[rank, column])
        }

    def _sample(self) -> list[float]:
        before, self.last = self.last, self._counters()
        seconds = max(self.last[0] - before[0], 1e-3)
        rates = [(now - then) / seconds / 1e6 for now, then in zip(self.last[1:], before[1:], strict=True)]
        memory = psutil.virtual_memory()
        free = shutil.disk_usage(self.scratch).free
        return [
            psutil.cpu_percent(),
            (memory.total - memory.available) / GIB,
            free / GIB,
            *rates,
            *self._gpus(),
        ]

    def _counters(self) -> list[float]:
        """Time, bytes read, written, sent and received on this node so far; NaN where the system does not count."""
        disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
        return [
            time.monotonic(),
            disk.read_bytes if disk else math.nan,
            disk.write_bytes if disk else math.nan,
            network.bytes_sent,
            network.bytes_recv,
        ]

    def _gpus(self) -> tuple[float, float]:
        if not self.nvml:
            return math.nan, math.nan
        import pynvml

        try:
            busy = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in self.nvml]
            used = [pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self.nvml]
        except pynvml.NVMLError:  # a MIG slice does not report it; a lost GPU fails the next step
            return math.nan, math.nan
        return sum(busy) / len(busy), sum(used) / GIB


def nvml_handles() -> list[object]:
    """The GPUs of this node as NVML names them; none where pynvml is not installed, or finds no driver it knows."""
    if importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
