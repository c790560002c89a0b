"""Predict how dissimilar a brain's responses to two images are, for all pairs of images that were never trained on.

Reading order: dissimilarity.py, stimuli.py, pairs.py, task.py, metrics.py, baselines.py, study.py.
"""

from finetune.tasks.rdm_prediction.planning import contents, inputs, metrics, open_study, plan, validate
from finetune.tasks.rdm_prediction.study import Config

__all__ = ["Config", "contents", "inputs", "metrics", "open_study", "plan", "validate"]
