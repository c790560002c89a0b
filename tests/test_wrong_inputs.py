"""What people type wrongly, through the same entry as `python -m <command>`: the answer says what is wrong, where, and
what to do next, on stderr, and the command ends with status 2."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import mlflow
import pytest

from data_sharding.write.build import build
from tests.helpers_scans import sharding_config, write_study
from training.watch.tracking import mlflow_environment

PRETRAIN = "pretrain kind=bold shards=SET run.folder=out/run engine=plain cluster=inline windows.bold.patch_voxels=3 "
PRETRAIN += "windows.bold.window_frames=8 --validate"
FINETUNE = "finetune shards=SET run.folder=out/run --validate"
SHARD = "data_sharding source.root=SCANS out=out/set space=mni12 --validate"
PREDICT = "finetune.predict scans=[SCANS] out=out/answers.csv tracking=DATABASE"

# A command, whose later words replace earlier ones of the same key, and what its answer says in this order.
WRONG = [
    ("pretrain", ["kind: required; add kind=<bold|t1>", "shards: required; add", "run.folder: required; add"]),
    ("pretrain kind=bold", ["shards: required; add shards=<shard set>", "run.folder: required"]),
    (f"{PRETRAIN} kind=BOLD", ["kind: 'BOLD' is not one of bold, t1, did you mean bold?"]),
    (f"{PRETRAIN} shards=nowhere", ["nowhere holds no shard set (no manifest.json): write one with 'python -m data_"]),
    (f"{PRETRAIN} shards=EMPTY", ["EMPTY holds no shard set", "source.root=<scans> out=EMPTY'"]),
    (f"{PRETRAIN} model=huge", ["model=huge: unknown choice; choose one of base, large, small, tiny"]),
    (f"{PRETRAIN} train.step=5", ["train.step: unknown key, did you mean train.steps?"]),
    (f"{PRETRAIN} train.steps=-5", ["train.steps: -5; must be above 0"]),
    (f"{PRETRAIN} train.steps=many", ["train.steps: expected int, got 'many' (str); give train.steps=<int>"]),
    (f"{PRETRAIN} batch_size=4", ["batch_size: unknown key, did you mean data.batch_size?"]),
    (f"{PRETRAIN} lr=1e-4", ["lr: unknown key, did you mean train.optimizer.learning_rate?"]),
    (f"{PRETRAIN} masking.hidden_share=1.5", ["masking.hidden_share: 1.5 hides", "; give a smaller share"]),
    (f"{PRETRAIN} cluster.use_gpu=true", ["cluster.use_gpu: 1 workers need a GPU each", "; lower cluster.num_workers"]),
    (f"{PRETRAIN} data.micro_batch_size=0", ["data.micro_batch_size: 0; must be above 0"]),
    (
        f"{PRETRAIN} shards=s3://nobody/x",
        ["s3://nobody/x/manifest.json: no AWS credentials were found; set AWS_PROFILE"],
    ),
    (
        "pretrain --kind bold --shards SET",
        ["unknown flag --kind, --shards; known: --help", "a key has no dashes: kind=..., shards=..."],
    ),
    (f"{PRETRAIN} run.folder=/proc/x", ["run.folder: /proc cannot be written (", "give another location"]),
    (f"{PRETRAIN} windows.bold.window_frames=1000", ["window_frames: 1000, but the longest run", "shorten the window"]),
    (f"{PRETRAIN} engine=deepspeed", ["engine=deepspeed: unknown choice; choose one of plain, zero0, zero1, zero2"]),
    (f"{PRETRAIN} atlas=schaefer", ["atlas=schaefer: SET holds ['template']; choose one of them"]),
    (f"{SHARD} source.root=nowhere", ["source.root: nowhere is not a folder; give the one that holds the scans"]),
    (f"{SHARD} source.root=EMPTY", ["EMPTY: no scan found. Looked for", "check source.root and source.kinds"]),
    (f"{SHARD} source.root=EMPTY out=EMPTY", ["EMPTY: no scan found"]),
    (f"{SHARD} space=MNI152NLin2009cAsym", ["space=MNI152NLin2009cAsym: unknown choice; choose one of", "mni12, mni2"]),
    (f"{SHARD} dataset=abide", ["dataset=abide: unknown choice; choose one of adhd200", "bids"]),
    ("data_sharding.verify", ["set: required; add set=<str>"]),
    ("data_sharding.verify nowhere", ["nowhere holds no shard set", "write one with"]),
    ("data_sharding.report nowhere", ["nowhere holds no shard set", "write one with"]),
    (
        f"{FINETUNE} encoder=models:/nothing@candidate",
        ["encoder=models:/nothing@candidate: sqlite:///out/mlflow.db: there"],
    ),
    (
        f"{FINETUNE} encoder=EMPTY",
        ["encoder=EMPTY: no folder with a model.yaml", "there is no file out/mlflow.db; check"],
    ),
    (f"{FINETUNE} encoder=EMPTY task=autism", ["task=autism: unknown choice; choose one of adhd_classification"]),
    (f"{PREDICT} classifier=models:/a@candidate", ["classifier: unknown key; 'python -m finetune.predict --show'"]),
    (f"{PREDICT} registered_model=adhd", ["registered_model=adhd: names no version; give models:/adhd@<alias>"]),
    (
        f"{PREDICT} registered_model=models:/a@b scans=[nowhere]",
        ["scans: nothing matches nowhere; give files, folders"],
    ),
    ("training.runs out/mlflow.db", ["out/mlflow.db is not an address; give sqlite:///<file> or http://<server>"]),
    (
        "training.runs sqlite:///nowhere.db",
        ["there is no file nowhere.db; check the address and the folder you are in"],
    ),
    ("training.pull bold pulled tracking=DATABASE", ["bold names no version; give bold@<alias> or bold/<version>"]),
    (
        "training.pull nothing@candidate pulled tracking=DATABASE",
        [
            "nothing@candidate is not registered at DATABASE",
            "'python -m training.runs DATABASE' lists what is registered",
        ],
    ),
    ("cluster.submit pretrian kind=bold", ["pretrian: unknown command", "did you mean pretrain?"]),
    (
        f"cluster.submit {PRETRAIN.removesuffix('--validate')}",
        ["these locations are relative", "run.folder=out/run", "give s3://bucket/prefix, http://server, or a path"],
    ),
    ("cluster.preflight pretrian kind=bold", ["pretrian: unknown command", "did you mean pretrain?"]),
    (
        PRETRAIN.replace("pretrain", "pretrain.analysis", 1).removesuffix(" --validate"),
        ["run.folder=out/run holds no metrics.json", "finish it with 'python -m pretrain'"],
    ),
    (
        "finetune.compare encoders=models:/a@candidate shards=SET run.folder=out/run",
        ["encoders: expected list[str] or", "got 'models:/a@candidate'; give \"encoders=['models:/a@candidate']\""],
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A set of shards, scans, an empty folder and a tracking database without models, by what commands call them."""
    folder = tmp_path_factory.mktemp("wrong")
    scans = write_study(folder / "scans", num_subjects=3, num_frames=(20,))
    config = sharding_config(scans, folder / "set")
    config.atlas = "template"
    build(config)
    (folder / "empty").mkdir()
    database = f"sqlite:///{folder}/mlflow.db"
    mlflow_environment(timeout_s=60)
    mlflow.MlflowClient(tracking_uri=database, registry_uri=database).search_registered_models()
    return {"SET": config.out, "SCANS": str(scans), "EMPTY": str(folder / "empty"), "DATABASE": database}


def answer(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit status and stderr of `python -m <command>`, in this process."""
    name, *words = command.split()
    last = {word.partition("=")[0]: word for word in words}  # Hydra refuses a key twice where it names a group
    sys.argv = [name, *last.values()]
    spec = importlib.util.find_spec(name)
    assert spec is not None
    is_package = spec.submodule_search_locations is not None
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"{name}.__main__" if is_package else name, run_name="__main__", alter_sys=False)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize(("command", "said"), WRONG, ids=[f"{number}" for number in range(1, len(WRONG) + 1)])
def test_a_wrong_input_is_answered_by_what_is_wrong_where_and_what_to_do_next(
    command: str,
    said: list[str],
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    expected = said
    for short, place in places.items():
        command = command.replace(short, place)
        expected = [text.replace(short, place) for text in expected]
    status, text = answer(command, capsys)
    assert status == 2, text
    assert "Traceback" not in text
    rest = text
    for part in expected:
        assert part in rest, text
        rest = rest.partition(part)[2]
    assert not list(tmp_path.iterdir()), "nothing is left behind"
