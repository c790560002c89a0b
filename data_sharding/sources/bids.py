"""BIDS: BOLD runs and T1w images of derivatives in a template space, or raw ones that will be registered.

Volumes, CIFTI series and GIFTI pairs, whichever the space needs. Where a scan exists in several spaces, resolutions or
echoes, the rules of bids_files.py choose one and the notes report the choice; what cannot be used is refused.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from brain_models import bids
from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader, read_header
from brain_models.space import NO_TEMPLATE, BrainSpace
from brain_models.surface_scans import is_surface_run, read_surface_header
from data_sharding.errors import SourceError
from data_sharding.scans import Scan, SourceContents, scan_id_of
from data_sharding.schema import Refusal
from data_sharding.sources import SourceConfig, parse_options
from data_sharding.sources.bids_files import (
    KIND_OF_SUFFIX,
    RAW_SPACES,
    SUFFIX_OF_KIND,
    Listing,
    ScanFile,
    fitting,
    in_space,
    is_by_fmriprep,
    listed,
    of_one_echo,
    read_events,
    read_participants,
)


@dataclass
class Options:
    """What only BIDS trees have."""

    echo: str | None  # of runs whose echoes were not combined; null refuses those
    sessions: list[str] | None  # labels without ses-; null uses all


def find(config: SourceConfig, space: BrainSpace, *, accepts_raw: bool) -> SourceContents:
    """Every scan of the folder that suits the space, and the refused ones; SourceError when there is no scan."""
    options = parse_options(config, Options)
    return find_in_tree(Path(config.root), config, options, space=space, accepts_raw=accepts_raw)


def find_in_tree(
    root: Path, config: SourceConfig, options: Options, *, space: BrainSpace, accepts_raw: bool
) -> SourceContents:
    """Every scan of one BIDS tree that suits the space; there may be none."""
    suffixes = sorted({SUFFIX_OF_KIND[kind] for kind in config.kinds if kind in SUFFIX_OF_KIND})
    also = ["T1w"] if accepts_raw else []  # raw runs are registered through them
    listing = listed(root, suffixes=[*suffixes, *also], on_surface=space.kind == "surface")
    wanted = {
        (suffix, name): files
        for (suffix, name), files in listing.files.items()
        if suffix in suffixes and _is_wanted(files[0].entities, config, options)
    }
    if not wanted and not listing.refused:
        raise SourceError(_nothing_found(root, config, suffixes))
    contents = SourceContents(scans=[], subjects=read_participants(root), refused=listing.refused)
    choices: Counter[str] = Counter()
    for (suffix, scan_id), files in wanted.items():
        try:
            chosen, choice = _choose(files, space, config=config, options=options, accepts_raw=accepts_raw)
            scan = _scan(chosen, root=root, contents=contents, listing=listing, space=space)
        except (ScanError, SourceError) as error:
            contents.refused.append(Refusal(scan_id, str(files[0].path), str(error)))
            continue
        choices[choice] += 1
        for kind in config.kinds:
            if SUFFIX_OF_KIND.get(kind) == suffix:
                events = [] if kind == "parcels" else scan.events  # they lie beside the voxels
                contents.scans.append(replace(scan, kind=kind, scan_id=scan_id_of(scan.entities, kind), events=events))
    contents.scans.sort(key=lambda scan: (scan.kind, scan.scan_id))
    contents.notes = [f"{count} scans: {choice}" for choice, count in sorted(choices.items())]
    contents.subjects = contents.subjects.reindex(sorted({scan.subject for scan in contents.scans}))
    return contents


def _is_wanted(entities: dict[str, str], config: SourceConfig, options: Options) -> bool:
    if config.subjects is not None and entities.get("sub") not in config.subjects:
        return False
    if options.sessions is not None and entities.get("ses") not in options.sessions:
        return False
    return entities["suffix"] != "bold" or config.tasks is None or entities.get("task") in config.tasks


def _choose(
    files: list[ScanFile], space: BrainSpace, *, config: SourceConfig, options: Options, accepts_raw: bool
) -> tuple[list[ScanFile], str]:
    """The file to use (two for a GIFTI run) and the choice in words."""
    if space.template == NO_TEMPLATE and files[0].entities["suffix"] == "bold":
        raise SourceError(f"{files[0].path}: space {space.name} has no template, BOLD needs one; set source.kinds=[t1]")
    suitable = in_space(files, space, allow_mix=config.allow_template_mix, accepts_raw=accepts_raw)
    of_echo, echo_choice = of_one_echo(suitable, options.echo)
    chosen = fitting(of_echo, space)
    kind = KIND_OF_SUFFIX[files[0].entities["suffix"]]
    others = sorted({file.described for file in files} - {chosen[0].described})
    over = f", chosen over {', '.join(others)}" if others else ""
    return chosen, f"{kind} {chosen[0].described}{over}{echo_choice}"


def _scan(chosen: list[ScanFile], *, root: Path, contents: SourceContents, listing: Listing, space: BrainSpace) -> Scan:
    path, entities = chosen[0].path, chosen[0].entities
    kind = KIND_OF_SUFFIX[entities["suffix"]]
    header = read_surface_header(path) if is_surface_run(path) else read_header(path, "t1w" if kind == "t1" else "bold")
    subject = entities["sub"]
    has_site = subject in contents.subjects.index and "site" in contents.subjects.columns
    site = contents.subjects.at[subject, "site"] if has_site else None
    sidecar = bids.inherited_sidecar(path, root=root)
    is_raw = chosen[0].space in RAW_SPACES and space.template != NO_TEMPLATE
    files = {"right": str(chosen[1].path)} if len(chosen) == 2 else {}
    if is_raw and kind == "bold":
        files["t1w"] = str(_t1w_of(chosen[0], listing))
    brain_mask = None if space.template == NO_TEMPLATE else bids.brain_mask_of(path)
    confounds = bids.confounds_of(path) if kind == "bold" else None
    return Scan(
        scan_id=scan_id_of(entities, kind),
        kind=kind,
        path=str(path),
        brain_mask=None if brain_mask is None else str(brain_mask),
        subject=subject,
        session=entities.get("ses", ""),
        task=entities.get("task", ""),
        run=entities.get("run", ""),
        site="" if site is None or site != site else str(site),
        repetition_time_s=repetition_time_s(path, header, sidecar) if kind == "bold" else 0.0,
        num_frames=header.num_frames,
        entities={name: value for name, value in entities.items() if name != "hemi"},
        files=files,
        events=read_events(path, root=root) if kind == "bold" else [],
        sidecar=sidecar,
        is_raw=is_raw,
        is_fmriprep=chosen[0].space not in RAW_SPACES and is_by_fmriprep(path, root=root),
        confounds=None if confounds is None else str(confounds),
    )


def _t1w_of(bold: ScanFile, listing: Listing) -> Path:
    """The raw T1w that a raw run is registered through: of its session, else of its subject; the first by name."""
    raw = [
        file
        for (suffix, _), files in listing.files.items()
        for file in files
        if suffix == "T1w" and file.entities["sub"] == bold.entities["sub"] and file.space in RAW_SPACES
    ]
    if not raw:
        raise SourceError(
            f"{bold.path}: in raw space, and sub-{bold.entities['sub']} has no T1w image to register it through; "
            "add it, or give a template-space version"
        )
    return min(raw, key=lambda file: (file.entities.get("ses") != bold.entities.get("ses"), str(file.path))).path


def repetition_time_s(path: Path, header: ScanHeader, sidecar: dict[str, object]) -> float:
    """The repetition time of the sidecar, else of the header; SourceError where neither has one."""
    seconds = bids.repetition_time_s(path, sidecar) or header.repetition_time_s
    if seconds is None:
        raise SourceError(
            f"{path}: no repetition time, neither RepetitionTime in a JSON sidecar nor in the header; add "
            f"{path.name[: path.name.index('.')]}.json with RepetitionTime in seconds"
        )
    return seconds


def _nothing_found(root: Path, config: SourceConfig, suffixes: list[str]) -> str:
    narrowed = " (source.subjects and source.tasks narrow it)" if config.subjects or config.tasks else ""
    endings = " or ".join(f"_[res-*_]desc-preproc_{suffix}.nii[.gz]" for suffix in suffixes)
    return (
        f"{root}: no scan found. Looked for sub-*/**/*_space-*{endings}{narrowed}; check source.root and source.kinds"
    )
