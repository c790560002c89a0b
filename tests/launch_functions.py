"""What tests/cluster/test_launch.py runs on workers: they import it, so it is a module of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed

from cluster.errors import StoreUnavailableError
from cluster.hanging import HEARTBEAT
from cluster.stopping import REQUEST
from training.errors import StoppedError, TrainingError


def sum_of_ranks(config: dict) -> dict:
    """Rank 0's view of a sum over ranks; the first attempt of rank 1 dies when the configuration names a marker."""
    value = torch.ones(1) * (torch.distributed.get_rank() + 1)
    marker = Path(config["marker"])
    if torch.distributed.get_rank() == 1 and not marker.exists():
        marker.touch()
        os._exit(1)
    torch.distributed.all_reduce(value)
    if torch.distributed.get_rank() == 0:
        print("a line of rank 0")
    return {
        "sum": float(value),
        "num_threads": torch.get_num_threads(),
        "niceness": os.nice(0),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "folder": os.getcwd(),
    }


def refuse(config: dict) -> None:
    if torch.distributed.get_rank() == 1:
        with Path(config["attempts"]).open("a") as file:
            file.write("x")
        raise TrainingError("a message for the user")
    torch.distributed.barrier()


def wait_to_be_asked(config: dict) -> str | None:
    """Why this worker was asked to stop; the driver gets SIGTERM once the worker is here."""
    if torch.distributed.get_rank() == 0:
        os.kill(config["driver"], signal.SIGTERM)
    deadline = time.monotonic() + 30
    while REQUEST.reason is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return REQUEST.reason


def stop_when_asked(config: dict) -> str:
    """Why every attempt before this one stopped; the last one is not asked to, for some seconds."""
    attempts = Path(config["attempts"])
    deadline = time.monotonic() + (30 if not attempts.exists() else 5)
    while REQUEST.reason is None and time.monotonic() < deadline:
        time.sleep(0.05)
    torch.distributed.barrier()
    if REQUEST.reason is None:
        return attempts.read_text()
    if torch.distributed.get_rank() == 0:
        attempts.write_text(REQUEST.reason)
    raise StoppedError(f"stopped as asked by {REQUEST.reason}; run the same command again")


def die_or_lose_the_store(config: dict) -> str:
    """One letter for every attempt before this one: the first dies, later ones find the store away."""
    attempts, is_main = Path(config["attempts"]), torch.distributed.get_rank() == 0
    before = attempts.read_text() if attempts.exists() else ""
    torch.distributed.barrier()
    if len(before) == config["ends_after"]:
        return before
    if is_main:
        attempts.write_text(before + "x")
        HEARTBEAT.saved = f"attempt {before}" if config["saves"] else None
        time.sleep(1)  # long enough to be heard
        if not before:
            os._exit(1)
        raise StoreUnavailableError("the store is away")
    torch.distributed.barrier()
    return ""
