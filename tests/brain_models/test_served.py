"""A registered model answers elsewhere as it did here: without this repository and without pickle."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from brain_models import bundle as bundles
from brain_models.encoder import EncoderConfig
from brain_models.preprocess import dequantise, pack_bold, standardise_bold
from brain_models.space import space_from_mask
from tests.bundles import cubes, encoder_bundle
from tests.scans import GRID_AFFINE, GRID_SHAPE, save_scan
from training.registry import models as registry

ELSEWHERE = """
import importlib.util, json, os, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path_hooks = [hook for hook in sys.path_hooks if "editable" not in repr(hook).lower()]
sys.path_importer_cache.clear()
for package in ("brain_models", "training", "data_sharding", "configs"):
    assert importlib.util.find_spec(package) is None, package
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/tiny@candidate")
table = pandas.DataFrame({"bold": [sys.argv[2]], "repetition_time_s": [float("nan")]})
print("ANSWER", json.dumps(model.predict(table).iloc[0].tolist()))
import numpy
packed = pandas.DataFrame({"bold": [numpy.load(sys.argv[3])], "repetition_time_s": [2.0]})
print("ANSWER", json.dumps(model.predict(packed).iloc[0].tolist()))
import brain_models
print("CODE", brain_models.__file__)
try:
    model.predict(pandas.DataFrame({"bold": [__file__ if "__file__" in globals() else sys.executable]}))
except Exception as error:
    print("REFUSED", type(error).__name__, error)
"""


def test_a_registered_encoder_embeds_a_nifti_file_where_this_repository_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    in_brain = np.zeros(GRID_SHAPE, dtype=bool)
    in_brain[4:12, 4:14, 4:12] = True
    space = space_from_mask(in_brain, GRID_AFFINE, name="box", template="NLin6Asym")
    torch.manual_seed(0)
    config = EncoderConfig(32, 2, 4, 2.0, 4, "seconds")
    bundle = encoder_bundle(config, {"bold": cubes(space, 4, tubelet_frames=2)})
    folder = bundles.save(tmp_path / "bundle", bundle)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry.register(folder, name="tiny", tags={}, alias="candidate", uri=uri, run_id=None, experiment="served")
    # MLflow silently drops columns that the signature lacks.
    read = set(re.findall(r'row(?:\[|\.get\()"(\w+)"', (registry.CODE_FOLDER / "inputs.py").read_text()))
    signature = mlflow.models.get_model_info("models:/tiny@candidate").signature
    assert set(signature.inputs.input_names()) == read
    assert read == {"bold", "t1w", "brain_mask", "confounds", "transform", "repetition_time_s"}
    scan = save_scan(
        tmp_path / "scan_bold.nii.gz", np.random.default_rng(0).normal(size=(*GRID_SHAPE, 10)) + 100, GRID_AFFINE
    )
    stored = standardise_bold(pack_bold(scan, space, brain_mask=None))
    np.save(tmp_path / "packed.npy", stored.quantised)
    with torch.inference_mode():
        frames = torch.from_numpy(dequantise(stored.quantised))[None]
        arguments = (torch.from_numpy(stored.is_measured)[None], torch.tensor([2.0]), "bold")
        windows = [bundle.encoder.encode_windows(frames[:, first : first + 4], *arguments) for first in (0, 4)]
        expected = torch.cat(windows).mean(dim=(0, 1))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(elsewhere),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, uri, str(scan), str(tmp_path / "packed.npy")],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [
        json.loads(line.removeprefix("ANSWER")) for line in done.stdout.splitlines() if line.startswith("ANSWER")
    ]
    for answer in answers:
        np.testing.assert_allclose(answer, expected.numpy(), atol=1e-6)
    assert len(answers) == 2
    code = next(line for line in done.stdout.splitlines() if line.startswith("CODE"))
    assert str(Path(registry.__file__).parents[1]) not in code
    assert "REFUSED ScanError" in done.stdout
    assert "not NIfTI" in done.stdout
    assert not list(tmp_path.rglob("*.pkl"))
