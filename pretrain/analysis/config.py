"""The schema of `report` in configs/pretrain.yaml: what a run says about itself. Changes no number of the training."""

from dataclasses import dataclass

from pretrain.embeddings import SentinelConfig
from pretrain.scores import IntervalConfig


@dataclass
class ReportConfig:
    """How much a finished run looks at itself."""

    intervals: IntervalConfig
    sentinels: SentinelConfig
