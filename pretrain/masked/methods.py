"""What a paper's Methods say of a masked pretraining: model, masking, baselines, scores, and the analyses that ran.

Sentences cite by key (reports.methods).
"""

from collections.abc import Mapping

from torch import nn

from configs.words import counted, listed
from data_sharding.read.methods import set_methods
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_set import WindowConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.sets import OpenedSet
from training.methods import interval_methods, training_methods

MASKINGS = {
    "random": "drawn at random",
    "tube": "patches drawn at random, in all frames of a window",
    "future": "those of the last frames of a window",
    "region": "regions drawn at random and patches by the region they belong to, in all frames of a window",
}
BASELINES = {
    "neighbour": "the mean of the {} nearest visible patches",
    "global_drift": "global signal and a drift of degree {} within the window, weighted per voxel",
    "ridge": "ridge regression of every voxel on the visible patch means of its frame, its penalty chosen on held-out "
    "training subjects",
}


def pretraining_methods(
    config: PretrainConfig, sets: Mapping[str, OpenedSet], task: MaskedVolumes, *, baselines: list[str], step: int
) -> list[str]:
    """Paragraphs about the sets, the model, the training and the scores; `task` holds whole parameters."""
    batch_size, weight_decay = config.data.batch_size, config.weight_decay
    return [
        *(set_methods(each.shard_set, [each.kind], [each.geometry.atlas]) for each in sets.values()),
        _model(config, sets, task),
        training_methods(config.train, batch_size=batch_size, weight_decay=weight_decay, step=step),
        _scores(config, baselines),
    ]


def _model(config: PretrainConfig, sets: Mapping[str, OpenedSet], task: MaskedVolumes) -> str:
    encoder, decoder, loss = config.model.encoder, config.model.decoder, config.loss
    windows = {name: each.geometry.window for name, each in sets.items()}
    video = "; @videomae" if any(window.window_frames > 1 for window in windows.values()) else ""
    of_encoder, of_decoder = map(_size, (task.encoder, task.decoder))
    seen = listed([f"{name}: {_window(window, sets[name])}" for name, window in windows.items()])
    alike = "" if loss.kind == "plain" else ", weighted so that all regions count alike"
    waves = f"{encoder.num_frequencies} random plane waves [@rff]"
    return (
        f"A masked autoencoder [@mae{video}] was trained to reconstruct hidden voxels from visible ones ({seen}). "
        f"Of all tokens {100 * config.masking.hidden_share:g} % were hidden ({config.masking.kind} masking: "
        f"{MASKINGS[config.masking.kind]}{_limits(config)}). Visible tokens went through a pre-norm transformer "
        f"[@transformer] of {counted(encoder.depth, 'block')}, width {encoder.width} and "
        f"{counted(encoder.num_heads, 'head')} ({of_encoder}), with positions in millimetres and {encoder.time_in} as "
        f"{waves}; a decoder [@crossmae] of {counted(decoder.depth, 'cross-attention block')} and width "
        f"{decoder.width} ({of_decoder}) guessed the hidden ones and was discarded. Voxels entered standardised by the "
        f"training split's mean and deviation; the loss is the squared error of hidden, measured voxels{alike}."
    )


def _size(module: nn.Module) -> str:
    return f"{sum(each.numel() for each in module.parameters()) / 1e6:.1f} million parameters"


def _window(window: WindowConfig, opened: OpenedSet) -> str:
    """`windows of 20 frames, patches of 6 x 6 x 6 voxels by 4 frames`."""
    edge = window.patch_voxels
    is_volume = opened.geometry.space.kind == "volume"
    patch = f"{edge} x {edge} x {edge} voxels" if is_volume else f"at most {edge**2} vertices"
    if window.window_frames == 1:
        return f"single images, patches of {patch}"
    return f"windows of {window.window_frames} frames, patches of {patch} by {counted(window.tubelet_frames, 'frame')}"


def _limits(config: PretrainConfig) -> str:
    """Where patches were hidden, unless that is the whole brain."""
    hidden = f"; only in {listed(config.masking.groups)}" if config.masking.groups else ""
    return hidden + (f"; never in {listed(config.masking.exclude)}" if config.masking.exclude else "")


def _scores(config: PretrainConfig, baselines: list[str]) -> str:
    numbers = {"neighbour": config.baselines.num_neighbours, "global_drift": config.baselines.drift_degree}
    beside = listed([BASELINES[name].format(numbers.get(name)) for name in baselines] or ["the training mean"])
    splits = config.train.evaluation.final_splits
    said = ["The embedding's effective rank [@rankme] and variance were watched for collapse."]
    if splits:
        said = [
            "Reconstruction was scored once, on all hidden, measured voxels of the "
            f"{listed(splits)} split, as R² about the training split's voxel mean, beside "
            f"{beside}, fitted on {config.baselines.fit_samples:,} training samples and scored on the same voxels.",
            interval_methods(config.report.intervals, strata=""),
            *said,
        ]
    contribution, probes = config.report.contribution, config.report.probes
    if contribution.num_samples:
        said.append(
            "Each region's contribution is the loss of R² when it is hidden as well, tested against control sets of "
            f"its size by {contribution.num_permutations:,} random signs of subjects' differences; the false discovery "
            f"rate over regions is {contribution.false_discovery_rate:g} [@bh]."
        )
    if probes.num_samples:
        said.append(
            "Site and repetition time were read from the frozen embedding by a linear discriminant [@sklearn] in "
            f"{probes.num_folds} folds over subjects, beside {probes.num_permutations} permutations of the labels."
        )
    return " ".join(said)
