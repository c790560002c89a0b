"""A registered model answers elsewhere as it did here: without this repository and without pickle."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json

from brain_models import bundle as bundles
from brain_models.encoder import EncoderConfig
from brain_models.errors import ScanError
from brain_models.inputs import columns_of
from brain_models.preprocess import dequantise, pack_bold, standardise_bold
from brain_models.space import space_from_mask
from tests.bundles import cubes, encoder_bundle
from tests.scans import GRID_AFFINE, GRID_SHAPE, save_scan
from training.registry import models as registry

MODEL = "models:/tiny@candidate"
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
print("ANSWER", json.dumps(model.predict(table).iloc[0].to_dict()))
import numpy
packed = pandas.DataFrame({"bold": [numpy.load(sys.argv[3])], "repetition_time_s": [2.0]})
print("ANSWER", json.dumps(model.predict(packed).iloc[0].to_dict()))
import brain_models
print("CODE", brain_models.__file__)
try:
    model.predict(pandas.DataFrame({"bold": [__file__ if "__file__" in globals() else sys.executable]}))
except Exception as error:
    print("REFUSED", type(error).__name__, error)
"""


@dataclass(frozen=True)
class Tiny:
    """A registered encoder, a scan as a file and as shards hold it, and the scan's embedding computed here."""

    uri: str
    scan: Path
    packed: Path
    embedding: np.ndarray


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("served")
    in_brain = np.zeros(GRID_SHAPE, dtype=bool)
    in_brain[4:12, 4:14, 4:12] = True
    space = space_from_mask(in_brain, GRID_AFFINE, name="box", template="NLin6Asym")
    torch.manual_seed(0)
    config = EncoderConfig(32, 2, 4, 2.0, 4, "seconds")
    bundle = encoder_bundle(config, {"bold": cubes(space, 4, tubelet_frames=2)})
    uri = f"sqlite:///{folder}/mlflow.db"
    registry.register(
        bundles.save(folder / "bundle", bundle),
        name="tiny",
        tags={},
        alias="candidate",
        uri=uri,
        run_id=None,
        experiment="served",
    )
    values = np.random.default_rng(0).normal(size=(*GRID_SHAPE, 10)) + 100
    scan = save_scan(folder / "sub-01_ses-2_bold.nii.gz", values, GRID_AFFINE)
    stored = standardise_bold(pack_bold(scan, space, brain_mask=None))
    np.save(folder / "packed.npy", stored.quantised)
    with torch.inference_mode():
        frames = torch.from_numpy(dequantise(stored.quantised))[None]
        arguments = (torch.from_numpy(stored.is_measured)[None], torch.tensor([2.0]), "bold")
        windows = [bundle.encoder.encode_windows(frames[:, first : first + 4], *arguments) for first in (0, 4)]
        embedding = torch.cat(windows).mean(dim=(0, 1)).numpy()
    return Tiny(uri, scan, folder / "packed.npy", embedding)


def clean_environment(home: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def test_a_registered_encoder_embeds_a_nifti_file_where_this_repository_is_unknown(tiny: Tiny, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, tiny.uri, str(tiny.scan), str(tiny.packed)],
        cwd=tmp_path,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [
        json.loads(line.removeprefix("ANSWER")) for line in done.stdout.splitlines() if line.startswith("ANSWER")
    ]
    for answer in answers:
        assert_embedding(answer, tiny.embedding)
    assert [(answer["subject"], answer["session"]) for answer in answers] == [("01", "2"), (None, None)]
    code = next(line for line in done.stdout.splitlines() if line.startswith("CODE"))
    assert str(Path(registry.__file__).parents[1]) not in code
    assert "REFUSED ScanError" in done.stdout
    assert "not NIfTI" in done.stdout
    assert not list(tiny.packed.parent.rglob("*.pkl"))


def test_the_signature_has_every_column_that_is_read_and_those_of_the_answer_with_their_types(tiny: Tiny) -> None:
    """MLflow silently drops columns that the signature lacks."""
    mlflow.set_tracking_uri(tiny.uri)
    read = set(re.findall(r'row(?:\[|\.get\()"(\w+)"', (registry.CODE_FOLDER / "inputs.py").read_text()))
    assert read == set(columns_of(["bold", "t1"]))
    info = mlflow.models.get_model_info(MODEL)
    assert {spec.name: (spec.type.name, spec.required) for spec in info.signature.inputs} == {
        "bold": ("string", True),
        "brain_mask": ("string", False),
        "confounds": ("string", False),
        "transform": ("string", False),
        "repetition_time_s": ("double", False),
    }
    outputs = [(spec.name, spec.type.name, spec.required) for spec in info.signature.outputs]
    assert outputs[:3] == [
        ("subject", "string", False),
        ("session", "string", False),
        ("embedding_0", "float", True),
    ]
    assert len(outputs) == 2 + 32
    assert not any(each.is_required for each in columns_of(["bold", "t1"]).values())


def test_a_request_to_a_server_may_hold_paths_and_packed_arrays(tiny: Tiny) -> None:
    """Read as the server reads it: arrays come as lists, NaN as null."""
    mlflow.set_tracking_uri(tiny.uri)
    model = mlflow.pyfunc.load_model(MODEL)
    assert model.input_example["bold"][0].endswith("_bold.nii.gz")
    packed = np.load(tiny.packed)
    floats = np.where(packed == -128, np.nan, packed / 21).astype(np.float16)
    columns = ["bold", "repetition_time_s"]
    rows = [[str(tiny.scan), None], [packed.tolist(), 2.0], [np.where(np.isnan(floats), None, floats).tolist(), 2.0]]

    def answers(request: dict[str, object]) -> list[dict[str, float]]:
        table = infer_and_parse_data(json.loads(json.dumps(request)), model.metadata.get_input_schema())
        written = io.StringIO()
        predictions_to_json(model.predict(table), written)
        return json.loads(written.getvalue())["predictions"]

    as_split = answers({"dataframe_split": {"columns": columns, "data": rows}})
    as_records = answers({"dataframe_records": [dict(zip(columns, row, strict=True)) for row in rows]})
    for answer in [*as_split, *as_records, *answers({"inputs": {"bold": [str(tiny.scan)]}})]:
        assert_embedding(
            answer, tiny.embedding, atol=1e-3 if answer is as_split[2] or answer is as_records[2] else 1e-6
        )
    assert [answer["subject"] for answer in as_split] == ["01", None, None]

    for bold, told in (
        ([[1, 2], [3]], "its lists are no array of numbers"),
        ([1, 2, 3], "1 axes of int64; give a packed array of 2 axes"),
        ((packed.astype(int) * 10).tolist(), "packed runs are int8, -128 to 127"),
    ):
        with pytest.raises(ScanError, match=told):
            answers({"dataframe_records": [{"bold": bold, "repetition_time_s": 2.0}]})


def test_requirements_are_versions_that_a_package_index_has(tiny: Tiny) -> None:
    """Of a build such as 2.13.0+cpu an index knows nothing."""
    mlflow.set_tracking_uri(tiny.uri)
    lines = Path(mlflow.pyfunc.get_model_dependencies(MODEL)).read_text().splitlines()
    assert f"torch=={torch.__version__.partition('+')[0]}" in lines
    assert not [line for line in lines if "+" in line]
    assert len(lines) == len({line.partition("==")[0] for line in lines})


@pytest.mark.faults
def test_a_clean_environment_with_the_models_own_requirements_loads_and_serves_it(tiny: Tiny, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(tiny.uri)
    model = mlflow.artifacts.download_artifacts(artifact_uri=MODEL, dst_path=str(tmp_path / "model"))
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", f"{model}/requirements.txt"], check=True)
    environment = clean_environment(tmp_path) | {"PATH": f"{tmp_path}/venv/bin:/usr/bin:/bin"}
    load = "import sys, mlflow, pandas; m = mlflow.pyfunc.load_model(sys.argv[1]);"
    load += "print(m.predict(pandas.DataFrame({'bold': [sys.argv[2]]})).to_json(orient='records'))"
    done = subprocess.run(
        [python, "-c", load, model, str(tiny.scan)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True
    )
    assert_embedding(json.loads(done.stdout)[0], tiny.embedding)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["models", "serve", "--model-uri", model, "--env-manager", "local", "--port", port]
    server = subprocess.Popen([python, "-m", "mlflow", *arguments], cwd=tmp_path, env=environment)
    try:
        packed = np.load(tiny.packed).tolist()
        for row in ({"bold": str(tiny.scan)}, {"bold": packed, "repetition_time_s": 2.0}):
            assert_embedding(asked(port, {"dataframe_records": [row]})[0], tiny.embedding)
    finally:
        server.terminate()
        server.wait(30)


def asked(port: str, request: dict[str, object]) -> list[dict[str, float]]:
    """The answers of a served model, which may still be starting."""
    body, kind = json.dumps(request).encode(), {"Content-Type": "application/json"}
    until = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, kind)
            ) as got:
                return json.loads(got.read())["predictions"]
        except urllib.error.HTTPError as error:
            pytest.fail(error.read().decode())
        except urllib.error.URLError:
            assert time.monotonic() < until, "no server after five minutes"
            time.sleep(1)


def assert_embedding(answer: dict[str, float], expected: np.ndarray, atol: float = 1e-6) -> None:
    found = [answer[f"embedding_{index}"] for index in range(len(expected))]
    np.testing.assert_allclose(found, expected, atol=atol)
