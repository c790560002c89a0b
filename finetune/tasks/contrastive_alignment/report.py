"""What a finished alignment says: its first sentence, and the sections of its report."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.tasks.contrastive_alignment.retrieval import METRICS, Similarities, chance
from reports.page import Section
from training.statistics import Interval

COLLAPSED = 1.5  # dimensions: fewer say that a side is one vector, or moves along one line
GEOMETRY = {
    "loss": "loss of the split as one batch",
    "constant_level": "that of a constant similarity",
    "random_level": "that of random embeddings",
    "positive_cosine": "cosine of pairs",
    "negative_cosine": "cosine of others",
    "alignment": "alignment",
    "uniformity_structure": "uniformity, T1",
    "uniformity_function": "uniformity, fMRI",
    "variance_structure": "variance, T1",
    "variance_function": "variance, fMRI",
    "rank_structure": "effective rank, T1",
    "rank_function": "effective rank, fMRI",
}


def verdict(recall: Interval, numbers: Mapping[str, float], *, num_subjects: int, p: float) -> str:
    """Whether held-out subjects are found by their other side, and what the loss is beside its two levels."""
    by_chance = chance("recall_1", num_subjects)
    said = "are found above chance" if recall.low > by_chance and p < 0.05 else "are not told apart from chance"
    text = (
        f"T1 and fMRI of {num_subjects} held-out subjects {said}: R@1 {recall} against {by_chance:.3f}, p {p:.3g} over "
        "random partners."
    )
    if "constant_level" in numbers:
        text += (
            f" The loss is {numbers['loss']:.3f}; {numbers['constant_level']:.3f} is that of a constant similarity, "
            f"{numbers['random_level']:.3f} that of random embeddings."
        )
    ranks = {"T1": numbers["rank_structure"], "fMRI": numbers["rank_function"]}
    if collapsed := [f"{name} ({rank:.1f} dimensions)" for name, rank in ranks.items() if rank < COLLAPSED]:
        text += f" Collapsed: {' and '.join(collapsed)}."
    return text


def conclusion_sections(found: Mapping[str, Similarities], numbers: Mapping[str, Mapping[str, float]]) -> list[Section]:
    """Retrieval of the splits beside chance, and how their embeddings lie."""
    rows = [
        [
            metric.title,
            *(
                text
                for each in found.values()
                for text in (f"{metric.value(each):.3f}", f"{chance(metric.name, len(each.subjects)):.3f}")
            ),
        ]
        for metric in METRICS
    ]
    head = ["", *(text for split in found for text in (split, "chance"))]
    lie = [
        [title, *(f"{numbers[split][name]:.3f}" if name in numbers[split] else "–" for split in found)]
        for name, title in GEOMETRY.items()
    ]
    return [
        Section("Retrieval of both splits", table=[head, *rows]),
        Section(
            "How the embeddings lie",
            table=[["", *found], *lie],
            text="A loss at the constant level comes from embeddings that have collapsed to one vector per side, a "
            "loss at the random level from embeddings that are unrelated. Alignment is the mean squared distance of "
            "pairs; uniformity the logarithm of the mean of exp(-2 squared distance); both are lowest where best.",
        ),
    ]
