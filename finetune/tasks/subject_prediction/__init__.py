"""Predict a class (ADHD or control) or a value (age) of a subject from resting BOLD: any column of the participants.

The head starts as a penalised linear model on frozen features, then moves, then the encoder opens from its top block
down. Reading order: labels.py, task.py, outcomes.py, study.py.
"""

from finetune.tasks.subject_prediction.config import Config
from finetune.tasks.subject_prediction.planning import (
    contents,
    inputs,
    metrics,
    open_study,
    plan,
    tested_subjects,
    unscored_problems,
    validate,
)
from finetune.tasks.subject_prediction.scores import read_scores

__all__ = [
    "Config",
    "contents",
    "inputs",
    "metrics",
    "open_study",
    "plan",
    "read_scores",
    "tested_subjects",
    "unscored_problems",
    "validate",
]
