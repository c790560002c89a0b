"""What matrices of dissimilarities cost: the whole one beside its bare product, and a step beside encoding every pair.

    python benchmarks/rdm.py --images 9841 --vertices 39548 --json rdm.json

The bare product is that of all patterns with all patterns; of the matrix one triangle is computed. Peak memory is that
of a process that holds the patterns (standardised in place) and computes the matrix.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from _measure import Row, arguments_of, cpu_seconds, report

from brain_models.image_encoders import ImageEncoder, ImageEncoderConfig
from brain_models.images import ImageInput
from brain_models.pair_heads import PairHeadConfig, make_head
from finetune.tasks.rdm_prediction.dissimilarity import rdm

MAX_RATIO, MAX_GB = 1.5, 3.0
PEAK = """
import resource, sys, torch
from finetune.tasks.rdm_prediction.dissimilarity import rdm
rdm(torch.randn({images}, {vertices}), "{measure}", overwrites=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--vertices", type=int, default=39548)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = {
        "The whole matrix": [
            matrix(arguments.images, arguments.vertices, measure, arguments.repetitions)
            for measure in ("pearson", "euclidean")
        ],
        "A step": [step(arguments.batch, arguments.repetitions)],
    }
    report("Matrices of dissimilarities", tables, repetitions=arguments.repetitions, json_path=arguments.json)


def matrix(images: int, vertices: int, measure: str, repetitions: int) -> Row:
    """The matrix of all images beside the bare product of their patterns."""
    patterns = torch.randn(images, vertices)
    contenders: dict[str, Callable[[], object]] = {
        "bare product, s": lambda: patterns @ patterns.T,
        "matrix, s": lambda: rdm(patterns, measure, overwrites=True),  # type: ignore[arg-type]
    }
    seconds = cpu_seconds(contenders, repetitions=repetitions)
    del patterns
    code = PEAK.format(images=images, vertices=vertices, measure=measure)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    ratio, peak = seconds["matrix, s"] / seconds["bare product, s"], float(done.stdout)
    found: Row = {
        "measure": measure,
        "images": images,
        "vertices": vertices,
        **seconds,
        "ratio": ratio,
        "peak, GB": peak,
    }
    return found | {"within the budget": "yes" if ratio <= MAX_RATIO and peak <= MAX_GB else "no"}


def step(batch: int, repetitions: int) -> Row:
    """Forward and backward of the two-layer CNN and a head: every image once, and both images of every pair."""
    spec = ImageInput(128, None, True, [0.0], [1.0], uses_min_max=True)
    encoder = ImageEncoder(ImageEncoderConfig("cnn", spec, "projected", 4096))
    head = make_head(encoder.num_features(), PairHeadConfig("projection", 64, 0, 0.0, "pearson", "linear"))
    images = torch.randint(256, (batch, 128, 128, 1), dtype=torch.uint8)
    first, second = torch.triu_indices(batch, batch, offset=1)

    def once() -> None:
        embedded = head.embed(encoder(images))
        head(embedded[first], embedded[second]).square().mean().backward()

    def every_pair() -> None:
        sides = [head.embed(encoder(images[side])) for side in (first, second)]
        head(*sides).square().mean().backward()

    seconds = cpu_seconds({"every image once, s": once, "every pair, s": every_pair}, repetitions=repetitions)
    gain = seconds["every pair, s"] / seconds["every image once, s"]
    return {"images": batch, "pairs": len(first), **seconds, "times faster": gain}


if __name__ == "__main__":
    main()
