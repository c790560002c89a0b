"""BIDS derivatives: preprocessed BOLD and T1w images in a template space, as fMRIPrep names them.

Chooses one file a scan when several spaces or resolutions lie there, and says which; refuses what is in raw space.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from brain_models.errors import ScanError
from brain_models.nifti import ScanHeader, read_header
from data_sharding.config import SourceConfig
from data_sharding.errors import SourceError
from data_sharding.scans import Found, Scan, scan_id_of
from data_sharding.schema import Refusal
from data_sharding.sources.bids_tables import inherited_sidecar, read_participants

SUFFIX_OF_KIND = {"bold": "bold", "t1": "T1w"}
HEADER_KIND = {"bold": "bold", "t1": "t1w"}
RAW_SPACES = ("", "T1w", "orig", "native", "scanner", "boldref", "individual", "func")
CHOICE_ENTITIES = ("space", "res", "den", "desc")  # files that differ in these only are the same scan


def find(config: SourceConfig, *, template: str, spacing_mm: float) -> Found:
    """Every scan of the folder that suits the template, with what was refused; SourceError when nothing is left."""
    root = Path(config.root)
    candidates = _candidates(root, config)
    wanted = f"MNI152{template}" if template.startswith("NLin") else template
    participants = read_participants(root)
    found = Found(scans=[], subjects=participants)
    choices: Counter[str] = Counter()
    for (kind, scan_id), paths in sorted(candidates.items()):
        try:
            path, choice = _choose(paths, wanted=wanted, spacing_mm=spacing_mm, kind=kind, config=config)
            found.scans.append(_scan(path, kind=kind, scan_id=scan_id, root=root, found=found))
            choices[choice] += 1
        except (ScanError, SourceError) as error:
            found.refused.append(Refusal(scan_id, str(paths[0]), str(error)))
    if not found.scans:
        raise SourceError(_nothing_usable(root, found.refused))
    found.notes = [f"{count} scans: {choice}" for choice, count in sorted(choices.items())]
    found.subjects = found.subjects.reindex(sorted({scan.subject for scan in found.scans}))
    return found


def entities_of(path: Path) -> dict[str, str]:
    """The BIDS entities of a file name, with `suffix`."""
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    *pairs, suffix = stem.split("_")
    return dict(pair.split("-", 1) for pair in pairs if "-" in pair) | {"suffix": suffix}


def _candidates(root: Path, config: SourceConfig) -> dict[tuple[str, str], list[Path]]:
    """Files by (kind, scan_id): several where a scan lies in several spaces or resolutions."""
    if not root.is_dir():
        raise SourceError(f"source.root: {root} is not a folder; give the top of a BIDS tree (holding sub-*)")
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted(root.glob("sub-*/**/*.nii*")):
        entities = entities_of(path)
        kind = next((kind for kind in config.kinds if SUFFIX_OF_KIND[kind] == entities["suffix"]), None)
        if kind is None or entities.get("desc", "preproc") != "preproc" or not path.name.endswith((".nii", ".nii.gz")):
            continue
        if config.subjects is not None and entities.get("sub") not in config.subjects:
            continue
        if kind == "bold" and config.tasks is not None and entities.get("task") not in config.tasks:
            continue
        found[kind, scan_id_of(entities, kind)].append(path)
    if not found:
        narrowed = " (source.subjects and source.tasks narrow it)" if config.subjects or config.tasks else ""
        endings = " or ".join(f"_[res-*_]desc-preproc_{SUFFIX_OF_KIND[kind]}.nii[.gz]" for kind in config.kinds)
        raise SourceError(
            f"{root}: nothing found. Looked for sub-*/**/*_space-*{endings}"
            f"{narrowed}; check source.root and source.kinds"
        )
    return found


def _choose(paths: list[Path], *, wanted: str, spacing_mm: float, kind: str, config: SourceConfig) -> tuple[Path, str]:
    """The file to take and the choice in words: the wanted template, then the finest not finer than needed."""
    by_space: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_space[entities_of(path).get("space", "")].append(path)
    in_template = {space: files for space, files in by_space.items() if space not in RAW_SPACES}
    if not in_template:
        raise SourceError(
            f"{paths[0]} is in raw space (no space- entity names a template); register it first, for example with "
            f"fMRIPrep --output-spaces {wanted}:res-2, and give its derivatives folder as source.root"
        )
    if wanted not in in_template and not config.allow_template_mix:
        raise SourceError(
            f"{paths[0]} lies in {', '.join(sorted(in_template))}, the space needs {wanted}; take a space= of that "
            "template, or set source.allow_template_mix=true (recorded in the manifest)"
        )
    space = wanted if wanted in in_template else sorted(in_template)[0]
    files = in_template[space]
    chosen = files[0] if len(files) == 1 else _by_spacing(files, spacing_mm=spacing_mm, kind=kind)
    others = sorted(
        {f"space-{entities_of(path).get('space', 'none')}" + _res(path) for path in paths if path != chosen}
    )
    return chosen, f"{kind} space-{space}{_res(chosen)}" + (f", chosen over {', '.join(others)}" if others else "")


def _res(path: Path) -> str:
    resolution = entities_of(path).get("res")
    return "" if resolution is None else f" res-{resolution}"


def _by_spacing(files: list[Path], *, spacing_mm: float, kind: str) -> Path:
    """The coarsest file that is still at least as fine as the target; the finest where none is."""
    spacings = {path: _spacing_mm(read_header(path, HEADER_KIND[kind])) for path in files}  # type: ignore[arg-type]
    fine_enough = [path for path in files if spacings[path] <= spacing_mm * 1.01]
    if fine_enough:
        return max(fine_enough, key=lambda path: (spacings[path], str(path)))
    return min(files, key=lambda path: (spacings[path], str(path)))


def _spacing_mm(header: ScanHeader) -> float:
    return float(np.cbrt(abs(np.linalg.det(header.affine[:3, :3]))))


def _scan(path: Path, *, kind: str, scan_id: str, root: Path, found: Found) -> Scan:
    header = read_header(path, HEADER_KIND[kind])  # type: ignore[arg-type]
    entities = entities_of(path)
    subject = entities["sub"]
    has_site = subject in found.subjects.index and "site" in found.subjects.columns
    site = found.subjects.at[subject, "site"] if has_site else None
    return Scan(
        scan_id=scan_id,
        kind=kind,
        path=path,
        brain_mask=_brain_mask(path),
        subject=subject,
        session=entities.get("ses", ""),
        task=entities.get("task", ""),
        run=entities.get("run", ""),
        site="" if site is None or site != site else str(site),
        repetition_time_s=_repetition_time_s(path, header, root) if kind == "bold" else 0.0,
        num_frames=header.num_frames,
        entities=entities,
    )


def _repetition_time_s(path: Path, header: ScanHeader, root: Path) -> float:
    sidecar = inherited_sidecar(path, root=root, entities_of=entities_of)
    stated = sidecar.get("RepetitionTime")
    if isinstance(stated, int | float) and not isinstance(stated, bool) and 0.05 <= stated <= 30:
        return float(stated)
    if stated is not None:
        raise SourceError(f"{path}: RepetitionTime {stated!r} in its sidecar is not a time in seconds; correct it")
    if header.repetition_time_s is None:
        raise SourceError(
            f"{path}: no repetition time, neither RepetitionTime in a JSON sidecar nor in the header; add "
            f"{path.name.removesuffix('.gz').removesuffix('.nii')}.json with RepetitionTime in seconds"
        )
    return header.repetition_time_s


def _brain_mask(path: Path) -> Path | None:
    """The mask that fMRIPrep puts beside a scan: same entities, desc-brain, suffix mask."""
    kept = [part for part in path.name.split("_")[:-1] if not part.startswith("desc-")]
    mask = path.with_name("_".join([*kept, "desc-brain_mask.nii.gz"]))
    return mask if mask.exists() else None


def _nothing_usable(root: Path, refused: list[Refusal]) -> str:
    shown = "\n".join(f"  {refusal.scan_id}: {refusal.reason}" for refusal in refused[:5])
    more = f"\n  and {len(refused) - 5} more" if len(refused) > 5 else ""
    return f"{root}: all {len(refused)} scans were refused:\n{shown}{more}"
