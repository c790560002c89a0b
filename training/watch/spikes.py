"""Losses far above those of the steps before: flagged with the step's scans, never a reason to stop.

A spike is kept as a line {step, loss, deviations, scan_ids} of spikes.jsonl, which travels with the commits, as do the
losses that the next steps are compared with.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from training.config import SpikeConfig

FILE = "spikes.jsonl"
RECENT = "recent_losses.json"  # of a commit: the last steps' losses, by what parts they have
SIGMA_OF_MAD = 1.4826  # a normal distribution's standard deviation, in median absolute deviations


class Spikes:
    def __init__(self, config: SpikeConfig, path: Path | None, *, start: bytes, recent: bytes) -> None:
        self.config = config
        self.path = path  # None: this rank writes nothing
        self.recent: dict[frozenset[str], deque[float]] = defaultdict(lambda: deque(maxlen=config.window_steps))
        for window in json.loads(recent or b"[]"):  # of every rank: all must see the same spikes
            self.recent[frozenset(window["parts"])].extend(window["losses"])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(start)

    def deviations(self, losses: Mapping[str, float]) -> float | None:
        """How many robust deviations a spike lies above the median of the last steps whose loss has the same parts
        (with several sets: steps of the same set); None when it is no spike."""
        loss, recent = losses["loss"], self.recent[frozenset(losses)]
        past = np.array(recent)
        recent.append(loss)
        if len(past) < self.config.window_steps // 2:
            return None
        median = float(np.median(past))
        spread = SIGMA_OF_MAD * float(np.median(np.abs(past - median)))
        above = (loss - median) / max(spread, 1e-9 * abs(median), 1e-30)
        return above if above > self.config.threshold else None

    def keep(self, step: int, *, loss: float, deviations: float, scan_ids: Sequence[str]) -> None:
        """Append the spike to the local file."""
        if self.path is not None:
            line = {"step": step, "loss": loss, "deviations": deviations, "scan_ids": list(scan_ids)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def snapshot(self, folder: Path) -> None:
        """Copy what was kept so far, and the last steps' losses, into a checkpoint's folder."""
        if self.path is not None:
            (folder / FILE).write_bytes(self.path.read_bytes())
            windows = [{"parts": sorted(parts), "losses": list(losses)} for parts, losses in self.recent.items()]
            (folder / RECENT).write_text(json.dumps(windows))
