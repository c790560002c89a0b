"""The public face: a loaded model embeds scan files, and the console script runs every command."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import callosum
from brain_models import bundle as bundles
from brain_models.encoder import EncoderConfig
from brain_models.errors import UserError
from brain_models.space import space_from_mask
from tests.bundles import cubes, encoder_bundle
from tests.scans import GRID_AFFINE, GRID_SHAPE, save_scan

ROOT = Path(__file__).parents[1]
CONFIG = EncoderConfig(width=32, depth=1, num_heads=4, mlp_ratio=2.0, num_frequencies=4, time_in="seconds")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    in_brain = np.zeros(GRID_SHAPE, dtype=bool)
    in_brain[4:9, 5:11, 4:8] = True
    space = space_from_mask(in_brain, GRID_AFFINE, name="box", template="NLin6Asym")
    torch.manual_seed(0)
    return bundles.save(tmp_path / "bundle", encoder_bundle(CONFIG, {"bold": cubes(space, 2, tubelet_frames=2)}))


def test_a_loaded_model_embeds_each_scan_of_a_folder_with_what_bids_says_of_it(folder: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    paths = [
        save_scan(
            study / f"sub-{name}" / f"sub-{name}_task-rest_bold.nii.gz",
            np.random.default_rng(seed).normal(size=(*GRID_SHAPE, 8)) + 100,
            GRID_AFFINE,
        )
        for seed, name in enumerate("ab")
    ]
    (study / "task-rest_bold.json").write_text('{"RepetitionTime": 0.8}')
    (study / "dataset_description.json").write_text("{}")
    model = callosum.load(folder)
    first, second = model.embed([study])
    expected = model.bundle.embed({"bold": str(paths[0]), "repetition_time_s": 0.8})
    assert torch.equal(first.scan, expected.scan)
    assert torch.equal(second.tokens, model.embed([paths[1]])[0].tokens)
    assert not torch.equal(first.scan, second.scan)
    assert isinstance(model, torch.nn.Module)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert not model.training


def test_a_model_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        callosum.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"there is no file .*mlflow.db; check the address"):
        callosum.load("models:/nobody@champion", tracking=f"sqlite:///{tmp_path}/mlflow.db")


def test_the_console_script_lists_every_command_with_its_purpose_and_runs_it() -> None:
    page = answer("--help")
    listed = re.findall(r"^  (\S+) +(\S.*\.)$", page.partition("Commands:\n")[2], flags=re.MULTILINE)
    assert max(map(len, page.splitlines())) <= 100
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert [name for name, _ in listed] == names
    assert dict(listed)["training.pull"] == "Fetch the bundle of a registered model into a local folder."
    assert answer("training.pull", "--help") == answer("--help", module="training.pull")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", answer("--version"))


def test_an_unknown_command_is_answered_with_the_nearest_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "callosum", "pretrian"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr == "callosum: unknown command pretrian; did you mean pretrain? 'callosum --help' lists all\n"


def answer(*words: str, module: str = "callosum") -> str:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
