"""The command to type after one of this package's, whole and right for what was just written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import configs
from configs.words import aligned, next_command, size_of

if TYPE_CHECKING:
    from data_sharding.phantoms.study.config import PhantomConfig
    from data_sharding.schema import Manifest

SPACES_MM = (2, 3, 4, 6, 12)  # of configs/space/mni*.yaml
COUNTED = {
    "subjects": "subjects",
    "bold_runs": "BOLD runs",
    "bold_frames": "BOLD frames",
    "t1": "T1 images",
    "parcels": "region series",
    "responses": "responses",
    "refused": "scans refused",
}
DEMO_MM = 6.0  # what the experiments quick_* and demo_* are made for
FEWEST_OF_LARGE = 130  # subjects that dataset=phantom can divide: 120 validate and test


def after_phantom(config: PhantomConfig) -> str:
    """Shards on the grid that the phantom's BOLD lies on, with splits that its subjects suffice for."""
    spacing = f"{config.spacing_mm:g}"
    space = [f"space=mni{spacing}"]
    if config.spacing_mm not in SPACES_MM:
        space = ["space=mni6", f"space.name=mni{spacing}", f"space.spacing_mm={spacing}"]
    dataset = "phantom" if config.num_subjects >= FEWEST_OF_LARGE else "phantom_small"
    root = config.out.rstrip("/")
    return next_command("data_sharding", f"source.root={root}", f"out={root}-shards", *space, f"dataset={dataset}")


def after_source_phantom(layout: str, out: str) -> str:
    """The command at the top of the data set's configuration, on the folder that was written."""
    text = (Path(configs.__file__).parent / "dataset" / f"{layout}.yaml").read_text()
    written, command = re.findall(r"^#   (python -m data_sharding.*)", text, flags=re.MULTILINE)[:2]
    found = re.search(r" out=(\S+)", written)
    assert found is not None
    return f"next: {command.replace(found[1], out.rstrip('/'))}"


def after_set(manifest: Manifest, location: str) -> str | None:
    """Pretraining on what the set holds most of; None for a set of neither BOLD nor T1."""
    kind = "bold" if manifest.counts["bold_runs"] else "t1"
    if not manifest.counts["bold_runs"] and not manifest.counts["t1"]:
        return None
    is_small = manifest.preprocessing["space"].get("spacing_mm") == DEMO_MM
    experiment = {"bold": "quick_bold", "t1": "demo_t1"}[kind]
    start = f"experiment={experiment}" if is_small else f"kind={kind}"
    location = location.rstrip("/")
    return next_command("pretrain", start, f"shards={location}", f"run.folder={location}-{kind}")


def contents(manifest: Manifest) -> str:
    """What a set holds, a line each."""
    counts = manifest.counts
    rows = [(f"  {words}", f"{counts[name]:,}") for name, words in COUNTED.items() if counts[name]]
    return aligned([*rows, ("  shards", f"{len(manifest.shards):,}"), ("  size", size_of(counts["bytes"]))])
