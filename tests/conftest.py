"""Shapes written as types are checked in tests: jaxtyping with beartype, on every function of our packages."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: on a busy machine workers would hardly run

from jaxtyping import install_import_hook

from tests.fault_report import pytest_runtest_makereport  # noqa: F401  (a hook: lines for docs/faults.md)

install_import_hook(
    ["brain_models", "pretrain.masked.masking", "finetune.tasks.subject_prediction.scores"], "beartype.beartype"
)
