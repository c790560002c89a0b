"""The command line on raw scans: registered by ANTs, packed through what was stored, the same bytes from then on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from brain_models.transform import Transform
from data_sharding import schema
from data_sharding.check.verify import verify
from data_sharding.read.shard_set import open_set
from data_sharding.registration.template import solid
from tests.brain_models.helpers_heads import (
    BOLD_AFFINE,
    SCAN_TO_TEMPLATE,
    T1_AFFINE,
    T1_SHAPE,
    bold_frames,
    head_around,
    marked_brain,
    scanned,
)
from tests.data_sharding.test_shards import contents
from tests.data_sharding.write.test_pipeline_writing import descendants
from tests.scans import save_scan

FAULT_SECTION = "Writing a shard set"
RUN, T1 = "sub-01_task-rest_bold", "sub-01_t1"
SMALL = [
    "space=mni12",
    "space.template=2009aSym",
    "splits.rule=none",
    "registration.spacing_mm=4",
    "registration.num_starts=2",
    "acceptance.min_frames=4",
    "preprocessing.cleaning.censor_above_fd_mm=5",
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BIDS folder of one person in scanner space: a whole head, and a run of six frames that move a little."""
    pytest.importorskip("ants", reason="antspyx is not installed: pip install -e '.[registration]'")
    root = tmp_path_factory.mktemp("raw")
    brain = marked_brain()
    head = scanned(head_around(brain), T1_AFFINE, T1_SHAPE, SCAN_TO_TEMPLATE)
    save_scan(root / "sub-01" / "anat" / "sub-01_T1w.nii.gz", head, T1_AFFINE)
    motion = np.tile(np.eye(4), (6, 1, 1))
    motion[:, :3, 3] = np.random.default_rng(2).uniform(-1, 1, size=(6, 3))
    session = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(-0.06, 0.08, 0.04), [-6.0, 5.0, 8.0])
    run = bold_frames(brain, SCAN_TO_TEMPLATE @ np.linalg.inv(session), motion)
    path = save_scan(root / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz", run, BOLD_AFFINE)
    path.with_name("sub-01_task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    return root


def command(module: str, *arguments: str, without_ants: bool = False) -> subprocess.CompletedProcess[str]:
    """A command line of a user; without ANTs, importing it fails in every process."""
    environment = dict(os.environ)
    if without_ants:
        blocked = Path(arguments[-1].removeprefix("out=")).parent / "blocked" / "ants"
        blocked.mkdir(parents=True)
        (blocked / "__init__.py").write_text("raise ImportError('blocked')\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(blocked.parent), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["affine", "nonlinear"])
def test_raw_scans_are_registered_by_the_command_and_stored_transforms_write_the_same_bytes_without_ants(
    kind: str, raw: Path, tmp_path: Path
) -> None:
    arguments = [f"source.root={raw}", "dataset=bids", f"registration={kind}", *SMALL]
    first, second = tmp_path / "first", tmp_path / "second"
    written = command("data_sharding", *arguments, "cluster=inline", f"out={first}")
    assert written.returncode == 0, written.stdout + written.stderr
    assert "registered 1/1 T1 images and their runs" in written.stdout
    shard_set = open_set(str(first))
    assert shard_set.manifest.preprocessing["alignment"] == kind
    assert (shard_set.manifest.counts["bold_runs"], shard_set.manifest.counts["t1"]) == (1, 1)
    assert verify(str(first)) == []
    brain = marked_brain()
    places_mm = brain.points_mm(solid(brain))
    truth_mm = nibabel.affines.apply_affine(np.linalg.inv(SCAN_TO_TEMPLATE), places_mm)
    transform = Transform.load(first / schema.TRANSFORMS / f"{T1}.npz")
    assert (transform.displacement_mm is None) == (kind == "affine")
    assert np.linalg.norm(transform.to_scan_mm(places_mm) - truth_mm, axis=1).mean() < 1.5
    moved_mm = shard_set.quality.set_index("scan_id").mean_framewise_displacement_mm[RUN]
    assert 0.5 < moved_mm < 4, "three axes of up to 2 mm a frame"

    second.mkdir()
    shutil.copy(first / schema.PLAN, second)
    shutil.copytree(first / schema.TRANSFORMS, second / schema.TRANSFORMS)
    again = command("data_sharding", *arguments, "cluster.num_workers=2", f"out={second}", without_ants=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "registered 1/1" not in again.stdout
    assert contents(second) == contents(first)

    assert command("data_sharding.report", str(first)).returncode == 0
    page = (first / "report.html").read_text()
    regions = page.partition("Regions covered worst")[2].partition("Balance of the splits")[0]
    assert "<table" in regions
    assert ("Affine registration only: a preview" in regions) == (kind == "affine")


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["driver", "registration"])
def test_a_kill_while_scans_are_registered_loses_none_of_them_and_leaves_no_process(
    victim: str, raw: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    out = tmp_path / "set"
    arguments = [f"source.root={raw}", "dataset=bids", "registration=affine", *SMALL, "cluster=inline", f"out={out}"]
    with subprocess.Popen([sys.executable, "-m", "data_sharding", *arguments], stdout=subprocess.DEVNULL) as driver:
        while not (below := [pid for pid, text in descendants(driver.pid).items() if "alignment" in text]):
            assert driver.poll() is None
            time.sleep(0.05)
        time.sleep(3)
        os.kill(driver.pid if victim == "driver" else below[0], signal.SIGKILL)
        killed = time.monotonic()
    deadline = time.monotonic() + 60  # a process that still imports ends behind its imports
    while any(Path(f"/proc/{process}").exists() for process in below):
        assert time.monotonic() < deadline, "the registration outlived its driver"
        time.sleep(0.05)
    assert command("data_sharding", *arguments).returncode == 0
    record_property("fault", f"SIGKILL of the {victim}, one process")
    record_property("when", "3 s into the registration")
    record_property("recovery_s", time.monotonic() - killed)
    assert verify(str(out)) == []
    assert {path.name for path in (out / schema.TRANSFORMS).iterdir()} == {f"{RUN}.npz", f"{T1}.npz"}


@pytest.mark.faults
def test_without_the_extra_the_command_says_how_to_install_it(raw: Path, tmp_path: Path) -> None:
    refused = command("data_sharding", f"source.root={raw}", "dataset=bids", *SMALL[:3], f"out={tmp_path / 'set'}")
    assert refused.returncode == 2
    assert "pip install -e '.[registration]' and registration=affine" in refused.stderr
