r"""Write all pairs of images with their dissimilarities as a table.

A pair is in the table when both its images are in one split. Nothing is trained.

Example:

  python -m finetune.rdm_pairs out/algonauts/subj01 region=V1 out=out/v1_pairs.csv

Required: shards=<response set, or folder with images/>  out=<file.csv>

Columns: split, image, other_image, dissimilarity. Often changed: region=V1, measure=euclidean, data.split.rule=ranked
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from configs.entry import Command, main
from configs.words import counted

if TYPE_CHECKING:
    from finetune.config import PairsConfig
    from finetune.tasks.rdm_prediction.pairs import Pairs

POSITIONAL = ("shards",)


def open_pairs(config: PairsConfig) -> Pairs:
    """The pairs of the set, split by image."""
    from finetune.tasks.rdm_prediction.pairs import make_pairs
    from finetune.tasks.rdm_prediction.stimuli import open_stimuli

    stimuli = open_stimuli(config.shards, config.data, region=config.region)
    return make_pairs(stimuli, config.measure, "images", seed=0)  # type: ignore[arg-type]


def run(config: PairsConfig) -> None:
    """Writes the table and says how large each split is."""
    import numpy as np

    from data_sharding.splits import SPLITS

    pairs = open_pairs(config)
    names = pairs.stimuli.names
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    with Path(config.out).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "image", "other_image", "dissimilarity"])
        for split in SPLITS:
            rows = pairs.images(split)
            matrix = pairs.stimuli.true_rdm(rows, pairs.measure)
            for one, other in zip(*np.nonzero(pairs.are_in(rows, split)), strict=True):
                writer.writerow([split, names[rows[one]], names[rows[other]], f"{matrix[one, other]:.8g}"])
            print(f"{split}: {counted(len(rows), 'image')}, {counted(len(rows) * (len(rows) - 1) // 2, 'pair')}")
    print(config.out)


def validate(config: PairsConfig) -> list[str]:
    """What is wrong with the configuration, the set's parts included."""
    from brain_models.errors import UserError

    if config.measure not in ("pearson", "euclidean"):
        return [f"measure: {config.measure!r} is not one of pearson, euclidean"]
    try:
        open_pairs(config)
    except UserError as error:
        return [str(error)]
    return []


def plan(config: PairsConfig) -> str:
    """How large the table would be."""
    from data_sharding.splits import SPLITS
    from finetune.tasks.rdm_prediction.pairs import num_pairs

    pairs = open_pairs(config)
    sizes = {split: num_pairs(len(pairs.images(split))) for split in SPLITS}
    return f"{config.out}: " + ", ".join(f"{counted(size, 'pair')} of {split}" for split, size in sizes.items())


def command() -> Command:
    from cluster.config import Needs
    from finetune.config import PairsConfig

    return Command(PairsConfig, run, plan, validate, lambda config: Needs(results=config.out))


if __name__ == "__main__":
    main("finetune.rdm_pairs", __doc__, command, positional=POSITIONAL)
