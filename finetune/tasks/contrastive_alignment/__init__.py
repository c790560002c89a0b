"""Align structure and function: find a subject's fMRI by its T1 among those of others, and the other way round.

Reading order: config.py, losses.py, task.py, retrieval.py, study.py; diagnosis.py and plateau.py.
"""

from finetune.tasks.contrastive_alignment.config import Config
from finetune.tasks.contrastive_alignment.planning import (
    contents,
    diagnose,
    inputs,
    metrics,
    open_study,
    plan,
    validate,
)

__all__ = ["Config", "contents", "diagnose", "inputs", "metrics", "open_study", "plan", "validate"]
