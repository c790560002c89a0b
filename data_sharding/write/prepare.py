"""Everything about a set except its voxels: the source's scans, the space, the atlases, the splits and the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from brain_models.atlas import Atlas, aal3, atlas_from_image, template_parcellation
from brain_models.space import BrainSpace, CubeSpaceConfig, cube_space, volume_space
from brain_models.surfaces import SurfaceSpaceConfig, surface_space
from configs.words import aligned, counted, size_of
from data_sharding import schema, sources
from data_sharding.config import AnySpaceConfig, ShardingConfig, atlas_choices
from data_sharding.errors import ShardError, SourceError
from data_sharding.scans import SourceContents
from data_sharding.sources.remote import source_view
from data_sharding.splits import SPLITS, assign_splits
from data_sharding.write.plan import SetPlan, make_plan

KINDS_IN_WORDS = {"t1": "T1", "parcels": "region series", "response": "responses"}
REFUSALS_SHOWN = 20


@dataclass
class Prepared:
    """What is known of a set before a voxel is read."""

    source: SourceContents
    space: BrainSpace
    atlases: list[Atlas]
    split_of_unit: dict[str, str]
    plan: SetPlan


def prepare(config: ShardingConfig) -> Prepared:
    """What is known of the set to write; reads headers and tables only."""
    images = [Path(choice) for choice in atlas_choices(config) if choice not in ("template", "aal3")]
    space = make_space(config.space, atlas_images=images)
    with source_view(config.source.root) as view:
        try:
            source = replace(config.source, root=view.root)
            contents = sources.find(source, config.privacy, space, accepts_raw=config.registration is not None)
        except SourceError as error:
            raise SourceError(view.reworded(str(error))) from error
        atlases = _atlases(config, space) + contents.atlases
        split_of_unit = assign_splits(contents.units, config.splits)
        plan = make_plan(contents, space, config, split_of_unit, atlases=atlases, original=view.original)
        for refusal in contents.refused:
            refusal.path, refusal.reason = view.reworded(refusal.path), view.reworded(refusal.reason)
    return Prepared(contents, space, atlases, split_of_unit, plan)


def make_space(config: AnySpaceConfig, *, atlas_images: list[Path]) -> BrainSpace:
    """The space of a configuration; a volume is joined with the atlases' voxels."""
    if isinstance(config, SurfaceSpaceConfig):
        return surface_space(config)
    if isinstance(config, CubeSpaceConfig):
        return cube_space(config)
    return volume_space(config, atlas_images=atlas_images)


def describe(config: ShardingConfig) -> str:
    """What `--plan` prints."""
    prepared = prepare(config)
    plan, contents = prepared.plan, prepared.source
    kinds = [scan.kind for scan in contents.scans]
    num_frames = sum(scan.num_frames for scan in contents.scans if scan.kind == "bold")
    others = ", ".join(f"{kinds.count(kind)} {words}" for kind, words in KINDS_IN_WORDS.items() if kind in kinds)
    splits = list(prepared.split_of_unit.values())
    lines = [
        f"set {config.name} -> {config.out}",
        f"space {prepared.space.name}: {counted(prepared.space.num_voxels, 'voxel')}",
        f"scans: {counted(kinds.count('bold'), 'BOLD run')} ({counted(num_frames, 'frame')})"
        + (f", {others}" if others else ""),
        f"refused from their headers: {len(contents.refused)}",
        *contents.notes,
        ("subjects: " if contents.stimuli is None else "stimuli: ")
        + ", ".join(f"{splits.count(split)} {split}" for split in SPLITS),
        f"shards: {len(plan.shards)}, {size_of(plan.num_bytes)}",
        *refusal_lines(contents.refused),
    ]
    return "\n".join(lines)


def refusal_lines(refused: list[schema.Refusal]) -> list[str]:
    """The first refused scans with their reasons as a table, and the number of others; empty when none was refused."""
    if not refused:
        return []
    rows = [("refused scan", "reason"), *((each.scan_id, each.reason) for each in refused[:REFUSALS_SHOWN])]
    lines = aligned([(f"  {scan}", reason) for scan, reason in rows]).splitlines()
    if len(refused) > REFUSALS_SHOWN:
        lines.append(f"  and {len(refused) - REFUSALS_SHOWN} more refused scans, all in {schema.MANIFEST}")
    return lines


def _atlases(config: ShardingConfig, space: BrainSpace) -> list[Atlas]:
    makers = {"template": template_parcellation, "aal3": aal3}
    atlases = [
        makers[choice](space) if choice in makers else atlas_from_image(Path(choice), space)
        for choice in atlas_choices(config)
    ]
    names = [atlas.name for atlas in atlases]
    if len(set(names)) < len(names):
        raise ShardError(f"atlas: the names {', '.join(names)} are not unique; rename the files")
    return atlases
