"""What a paper's Methods say of a subject prediction: set, encoder and head, training, baselines and statistics.

Sentences cite by key (reports.methods).
"""

from __future__ import annotations

from collections.abc import Sequence

from brain_models.encoder import EncoderConfig
from brain_models.heads import HeadConfig
from configs.words import counted, listed
from data_sharding.read.methods import set_methods
from data_sharding.read.shard_set import ShardSet
from finetune.config import FinetuneConfig
from finetune.tasks.subject_prediction.config import Config
from finetune.tasks.subject_prediction.labels import ClassLabel, ValueLabel
from training.methods import interval_methods, training_methods
from training.statistics import Metric
from training.unfreezing import UnfreezingConfig


def prediction_methods(
    run: FinetuneConfig,
    config: Config,
    shard_set: ShardSet,
    *,
    encoder: EncoderConfig,
    num_frames: int,
    metrics: Sequence[Metric],
    step: int,
) -> list[str]:
    """Paragraphs about the set, the model, the training, and what it is compared with; `num_frames` are those of a run
    that one prediction is made from."""
    windows = f"{counted(config.num_windows, 'consecutive window')} of each BOLD run ({num_frames:,} frames)"
    model = (
        f"The pretrained encoder {run.encoder}, a transformer [@transformer] of {counted(encoder.depth, 'block')} and "
        f"width {encoder.width}, read {windows}."
    )
    opening = _opening(config.unfreezing, num_steps=run.train.steps, head_scale=config.head_learning_rate_scale)
    return [
        set_methods(shard_set, ["bold"], [shard_set.atlases[config.atlas]]),
        " ".join([_label(config.label), model, _head(config.head), _start(config), opening]),
        training_methods(run.train, batch_size=run.data.batch_size, weight_decay=config.weight_decay, step=step),
        " ".join([_baselines(config), _scores(run, config, metrics)]),
    ]


def _label(label: ClassLabel | ValueLabel) -> str:
    if isinstance(label, ClassLabel):
        return f"Predicted was {label.column}: {' or '.join(label.cases)} against {' or '.join(label.controls)}."
    return f"Predicted was {label.column}, in {label.unit}."


def _head(head: HeadConfig) -> str:
    if head.pooling == "attention":
        return f"Its tokens were averaged with learned weights; dropout {head.dropout:g} and one linear layer followed."
    return (
        f"Its tokens were averaged by region and projected to {counted(head.num_channels, 'channel')}; Fisher's z of "
        "the correlation of every pair of regions over windows and channels, standardised, went through dropout "
        f"{head.dropout:g} and one linear layer."
    )


def _start(config: Config) -> str:
    if config.probe is None:
        return "The head started at zero."
    kind = "logistic" if isinstance(config.label, ClassLabel) else "ridge"
    return (
        f"The head started as a {kind} regression [@sklearn] on the frozen encoder's features, its penalty chosen in "
        f"{config.probe.num_folds} folds of training subjects, before the encoder was trained [@kumar]."
    )


def _opening(config: UnfreezingConfig, *, num_steps: int, head_scale: float) -> str:
    """How far and when the encoder was trained."""
    head = f"The head's learning rate was {head_scale:g} times that of the run."
    first, per_layer = config.first_layer_opens_at_step, config.steps_per_layer
    if first is not None and first >= num_steps:
        return f"{head} The encoder stayed as it was."
    when = f"from step {first}, a further one after every {counted(per_layer or 0, 'step')}"
    if config.plateau is not None:
        when = f"one at every plateau of {config.plateau.metric}"
    elif not per_layer:
        when = f"together, at step {first}"
    return (
        f"{head} The encoder's layers opened from the top down, {when}; the top layer's learning rate was "
        f"{config.learning_rate_scale:g} times that of the run, and every deeper one's {config.depth_decay:g} times "
        "that of the layer above."
    )


def _baselines(config: Config) -> str:
    linear, kind, scaled = config.baselines, "ridge", ""
    if isinstance(config.label, ClassLabel):
        kind, scaled = "logistic", ", its outputs scaled to the folds' held-out subjects [@platt]"
    site = " after each site's mean was taken off" if linear.regress_out_site else ""
    return (
        f"Baselines on the same subjects: L2-penalised {kind} regression [@sklearn] of Fisher's z of the correlations "
        f"between regions{site}, its penalty chosen in {linear.num_folds} folds of training subjects{scaled}; and the "
        "site alone."
    )


def _scores(run: FinetuneConfig, config: Config, metrics: Sequence[Metric]) -> str:
    is_class = isinstance(config.label, ClassLabel)
    chosen = {"validation": "the best on validation subjects", "half": "even odds"}[config.threshold]
    threshold = f"; the threshold is {chosen}" if is_class else ""
    strata = " within sites and classes" if is_class else " within sites"
    return (
        "The test split was scored once, runs of a subject averaged first, by "
        f"{listed([metric.title for metric in metrics])}{threshold}. {interval_methods(run.bootstrap, strata=strata)}"
    )
