"""The pretrained encoder that a task starts from, as a local bundle folder with what is known of its origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.space import BrainSpace
from finetune.config import FinetuneConfig
from training.checkpoint import file_sha256
from training.collectives import this_process
from training.registry import models as registry
from training.registry.seen_subjects import read_seen

MODEL = "model.yaml"  # of every bundle
GOLDEN = "golden.npy"  # of a bundle: a small file that other weights give another content


@dataclass(frozen=True)
class Backbone:
    """A bundle folder with its registry entry's tags; `seen` are hashes of its training subjects, None if unknown."""

    folder: Path
    tags: dict[str, str]
    seen: set[str] | None

    def load(self, space: BrainSpace) -> Bundle:
        """The bundle; of several BOLD stems, the one for `space` is named bold."""
        return self.bundle_in("bold", space)

    def bundle_in(self, kind: str, space: BrainSpace) -> Bundle:
        """The bundle; of several stems of a kind, the one for `space` is named as the kind."""
        return bundle.load(self.folder).in_space(kind, space)

    @property
    def golden_hash(self) -> str:
        """Hex sha256 of the golden output, by which a bundle written anew is told from the one before."""
        return file_sha256(self.folder / GOLDEN)


def fetch_backbone(config: FinetuneConfig) -> Backbone:
    """The backbone's bundle on this node: a folder as it is, a registered model downloaded."""
    local = Path(config.encoder)
    if (local / MODEL).exists():
        return Backbone(local, {}, read_seen(local))
    run, uri = config.run, config.train.tracking.uri
    target = Path(run.scratch) / f"{run.name}-backbone-{this_process().rank:05d}"
    folder = registry.pull(config.encoder, target, uri=uri)
    assert uri is not None  # pull has refused a missing registry
    return Backbone(folder, registry.version_tags(config.encoder, uri=uri), read_seen(folder))


def local_bundles(encoders: list[str]) -> dict[str, str]:
    """The encoders that are bundle folders here, each with a file that it holds."""
    return {encoder: MODEL for encoder in encoders if (Path(encoder) / MODEL).exists()}
