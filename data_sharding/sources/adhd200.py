"""ADHD-200: raw BIDS trees of each site, or the Athena folder of preprocessed runs, with the phenotype table as it is.

Subjects are named by their ScanDir ID, padded to 7 digits, so that both forms and the table meet. "pending" is never a
diagnosis: it is missing. Runs whose quality column says 0 are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from brain_models.errors import ScanError
from brain_models.nifti import read_header
from brain_models.space import BrainSpace
from data_sharding.errors import SourceError
from data_sharding.scans import Scan, SourceContents, scan_id_of
from data_sharding.schema import Refusal
from data_sharding.sources import SourceConfig, bids, parse_options

RAW_FOLDER = "RawDataBIDS"
ATHENA_NAME = re.compile(r"sfnwmrda(\d+)_session_(\d+)_rest_(\d+)\.nii(\.gz)?")
ID_DIGITS = 7
MISSING = {"", "-999", "N/A", "n/a", "pending", "#N/A", "NaN"}
SITES = {1: "Peking", 2: "Brown", 3: "KKI", 4: "NeuroIMAGE", 5: "NYU", 6: "OHSU", 7: "Pittsburgh", 8: "WashU"}
DIAGNOSES = {0: ("control", "control"), 1: ("ADHD", "combined"), 2: ("ADHD", "hyperactive"), 3: ("ADHD", "inattentive")}
SEXES = {0: "F", 1: "M"}
HANDEDNESS = {"R": 1.0, "L": 0.0}  # letters of some sites; numbers are kept: 0 left, 1 right, fractions between
REQUIRED_COLUMNS = ("ScanDir ID", "Site", "Gender", "Age", "DX")


@dataclass
class Options:
    """Which form of the data set, and how its quality columns count."""

    form: str  # raw (RawDataBIDS/<Site>/sub-*) or athena (sfnwmrda<ID>_session_<s>_rest_<r>.nii.gz)
    phenotypes: str | None  # the CSV; null: *phenotypic*.csv under source.root
    athena_template: str  # the template that the Athena runs are in
    refuse_failed_quality: bool  # runs and T1s whose QC column is 0
    echo: str | None
    sessions: list[str] | None


def find(config: SourceConfig, space: BrainSpace, *, accepts_raw: bool) -> SourceContents:
    """Every rest run and T1w that suits the space; a subject without a diagnosis stays, with a missing one."""
    options = parse_options(config, Options)
    root = Path(config.root)
    if options.form not in ("raw", "athena"):
        raise SourceError(f"source.options.form: {options.form!r}; give raw or athena")
    table = read_phenotypes(_phenotype_files(root, options))
    if options.form == "athena":
        contents = _athena(root, config, options, space)
    else:
        contents = _raw(root, config, options, space, accepts_raw=accepts_raw)
    if options.refuse_failed_quality:
        _refuse_failed(contents, table)
    subjects = sorted({scan.subject for scan in contents.scans})
    contents.notes += _notes_on(table, subjects)
    contents.subjects = table.reindex(subjects).rename_axis("subject_id")
    for scan in contents.scans:
        site = contents.subjects.at[scan.subject, "site"]
        scan.site = scan.site if pd.isna(site) else str(site)
    return contents


def read_phenotypes(paths: list[Path]) -> pd.DataFrame:
    """One row a subject, by padded id: site, sex, age, handedness, diagnosis, subtype, IQ, qc_*; missing as missing."""
    tables = [_typed(path) for path in paths]
    table = pd.concat(tables)
    if not table.index.is_unique:
        twice = sorted(table.index[table.index.duplicated()].unique())
        raise SourceError(
            f"{', '.join(map(str, paths))}: several rows for subject {', '.join(twice[:5])}; keep one row a subject"
        )
    return table.sort_index()


def padded_id(text: str) -> str:
    """A ScanDir ID with its leading zeros."""
    return text.strip().zfill(ID_DIGITS)


def _typed(path: Path) -> pd.DataFrame:
    text = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    text = text.rename(columns=str.strip).map(str.strip)
    if missing := [column for column in REQUIRED_COLUMNS if column not in text.columns]:
        raise SourceError(f"{path} lacks the columns {', '.join(missing)}; give the ADHD-200 phenotype CSV")
    if bad := sorted({name for name in text["ScanDir ID"] if not name.isdigit()}):
        raise SourceError(f"{path}: ScanDir ID {bad[0]!r} is not a number; correct the row")
    present = text.where(~text.isin(MISSING))

    def number(column: str) -> pd.Series:
        if column not in present.columns:
            return pd.Series(float("nan"), index=present.index)
        values = pd.to_numeric(present[column], errors="coerce").astype("float64")
        wrong = present[column][present[column].notna() & values.isna()]
        if len(wrong):
            raise SourceError(
                f"{path}: {column} holds {wrong.iloc[0]!r}, neither a number nor a mark for missing; correct it"
            )
        return values

    handedness = present["Handedness"].replace(HANDEDNESS) if "Handedness" in present else None
    present["Handedness"] = handedness
    table = pd.DataFrame(
        {
            "site": _coded(number("Site"), SITES, path, "Site"),
            "sex": _coded(number("Gender"), SEXES, path, "Gender"),
            "age": number("Age"),
            "handedness": number("Handedness"),
            "diagnosis": _coded(number("DX"), {code: names[0] for code, names in DIAGNOSES.items()}, path, "DX"),
            "subtype": _coded(number("DX"), {code: names[1] for code, names in DIAGNOSES.items()}, path, "DX"),
            "adhd_index": number("ADHD Index"),
            "full_iq": number("Full4 IQ").fillna(number("Full2 IQ")),
            "medication": number("Med Status"),
        }
        | {column.lower(): number(column) for column in text.columns if column.startswith("QC_")}
    )
    return table.set_index(pd.Index(text["ScanDir ID"].map(padded_id), name="subject_id"))


def _coded(numbers: pd.Series, names: dict[int, str], path: Path, column: str) -> pd.Series:
    unknown = sorted(set(numbers.dropna()) - set(names))
    if unknown:
        raise SourceError(f"{path}: {column} holds {unknown[0]:g}, not one of {sorted(names)}; correct the row")
    return numbers.map({float(code): name for code, name in names.items()}).astype("str")


def _phenotype_files(root: Path, options: Options) -> list[Path]:
    if options.phenotypes is not None:
        paths = [Path(options.phenotypes)]
    else:
        paths = sorted(root.glob("*phenotypic*.csv")) or sorted(root.glob("**/*phenotypic*.csv"))
    if not paths or not paths[0].is_file():
        where = options.phenotypes or f"{root}/**/*phenotypic*.csv"
        raise SourceError(f"no phenotype table at {where}; give it as source.options.phenotypes=<file.csv>")
    return paths


def _raw(root: Path, config: SourceConfig, options: Options, space: BrainSpace, *, accepts_raw: bool) -> SourceContents:
    """The trees of all sites together; a site whose scans are all refused does not hide the others."""
    top = root / RAW_FOLDER if (root / RAW_FOLDER).is_dir() else root
    sites = [folder for folder in sorted(top.iterdir()) if folder.is_dir() and any(folder.glob("sub-*"))]
    if not sites:
        raise SourceError(f"{top}: no site folder with sub-* in it; give the folder that holds {RAW_FOLDER}")
    tree_options = bids.Options(echo=options.echo, sessions=options.sessions)
    contents = SourceContents(scans=[], subjects=pd.DataFrame())
    for site in sites:
        of_site = bids.find_in_tree(site, config, tree_options, space=space, accepts_raw=accepts_raw)
        for scan in of_site.scans:
            scan.site = site.name
        contents.scans += of_site.scans
        contents.refused += of_site.refused
        contents.notes += [f"{site.name}: {note}" for note in of_site.notes]
    _refuse_duplicates(contents)
    return contents


def _refuse_duplicates(contents: SourceContents) -> None:
    counts = Counter(scan.scan_id for scan in contents.scans)
    for scan in contents.scans:
        if counts[scan.scan_id] > 1:
            reason = f"{scan.path}: {counts[scan.scan_id]} sites have a scan of this name; keep one of them"
            contents.refused.append(Refusal(scan.scan_id, scan.path, reason))
    contents.scans = [scan for scan in contents.scans if counts[scan.scan_id] == 1]


def _athena(root: Path, config: SourceConfig, options: Options, space: BrainSpace) -> SourceContents:
    if space.kind != "volume" or (space.template != options.athena_template and not config.allow_template_mix):
        raise SourceError(
            f"the Athena runs lie in {options.athena_template}, the space {space.name} is {space.template}; choose a "
            "volume space= of that template, or set source.allow_template_mix=true (recorded in the manifest)"
        )
    contents = SourceContents(scans=[], subjects=pd.DataFrame())
    named = [(path, ATHENA_NAME.fullmatch(path.name)) for path in sorted(root.glob("**/sfnwmrda*.nii*"))]
    matches = [(path, match) for path, match in named if match is not None]
    if not matches:
        raise SourceError(f"{root}: no sfnwmrda<ID>_session_<s>_rest_<r>.nii.gz; check source.root, or form=raw")
    seen: set[str] = set()
    for path, match in matches:
        subject, session, run = padded_id(match[1]), match[2], match[3]
        if config.subjects is not None and subject not in config.subjects:
            continue
        if options.sessions is not None and session not in options.sessions:
            continue
        entities = {"sub": subject, "ses": session, "task": "rest", "run": run, "suffix": "bold"}
        try:
            for kind in config.kinds:
                if kind in ("bold", "parcels"):
                    scan = _athena_scan(path, entities, kind)
                    if scan.scan_id in seen:
                        raise SourceError(f"{path}: a second file of the same run; keep one of them")
                    seen.add(scan.scan_id)
                    contents.scans.append(scan)
        except (ScanError, SourceError) as error:
            contents.refused.append(Refusal(scan_id_of(entities, "bold"), str(path), str(error)))
    contents.notes = [f"{len(contents.scans)} scans: Athena runs, filtered and smoothed by its pipeline"]
    return contents


def _athena_scan(path: Path, entities: dict[str, str], kind: str) -> Scan:
    header = read_header(path, "bold")
    return Scan(
        scan_id=scan_id_of(entities, kind),
        kind=kind,
        path=str(path),
        repetition_time_s=bids.repetition_time_s(path, header, {}),
        num_frames=header.num_frames,
        entities=entities,
        subject=entities["sub"],
        session=entities["ses"],
        task="rest",
        run=entities["run"],
    )


def _refuse_failed(contents: SourceContents, table: pd.DataFrame) -> None:
    """Refuses scans whose QC_Rest_<run> (T1: QC_Anatomical_<run>) is 0; a scan without a run entity counts as run 1."""
    passed = []
    for scan in contents.scans:
        column = f"qc_{'anatomical' if scan.kind == 't1' else 'rest'}_{int(scan.run or 1)}"
        is_known = scan.subject in table.index and column in table.columns
        if is_known and table.at[scan.subject, column] == 0:
            reason = (
                f"{scan.path}: {column} of the phenotype table is 0, its quality control failed; set "
                "source.options.refuse_failed_quality=false to use it anyway"
            )
            contents.refused.append(Refusal(scan.scan_id, scan.path, reason))
        else:
            passed.append(scan)
    contents.scans = passed


def _notes_on(table: pd.DataFrame, subjects: list[str]) -> list[str]:
    unlisted = [subject for subject in subjects if subject not in table.index]
    unlabelled = int(table.reindex(subjects)["diagnosis"].isna().sum()) - len(unlisted)
    notes = [f"{unlabelled} subjects have no diagnosis (pending or missing)"] if unlabelled else []
    return notes + ([f"{len(unlisted)} subjects are not in the phenotype table"] if unlisted else [])
