"""The report of a finished run: maps, region contributions and probes, set by set, as files and numbers.

One process with whole weights; costs what `report` in the configuration allows.
"""

import csv
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from cluster.storage.stores import store_for
from data_sharding.read.batch import WindowBatch
from data_sharding.read.joint import named
from data_sharding.read.reader import BatchSource
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.sets import OpenedSet, build_task, windows_of
from pretrain.report.config import PROBED_SPLITS
from pretrain.report.contribution import Contribution, Experiment, contexts, contributions
from pretrain.report.maps import voxel_maps, write_nifti
from pretrain.report.pictures import Example, draw_contributions, draw_courses, draw_example, draw_maps
from pretrain.report.probes import by_subject, probe, same_question
from pretrain.report.scores import RegionScore, as_csv, plain
from pretrain.report.sections import region_section, score_section
from reports.figures import as_image
from reports.page import Section
from training.engine.base import own_device
from training.watch.tracking import log_folder

FOLDER = "report"  # of the run folder, and of the MLflow run's artifacts
RECONSTRUCTION = "reconstruction.csv"


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A task with the weights of a run, in evaluation mode on `device`, and its sets."""

    task: MaskedVolumes
    config: PretrainConfig
    sets: Mapping[str, OpenedSet]
    device: torch.device

    def batches(self, name: str, split: str, limit: int | None) -> Iterator[WindowBatch]:
        """The windows of a set's split, or a fixed hashed subset, without padding, on the device."""
        source = BatchSource(windows_of(self.sets[name]), self.config.data, rank=0, world_size=1)
        for batch in source.evaluation(split, limit=limit):
            if bool((batch.weight > 0).any()):
                yield named(without_padding(batch.to(self.device)), name)
        source.close()

    def subject_of(self, name: str, splits: list[str]) -> dict[str, str]:
        """Subjects by scan."""
        runs = self.sets[name].shard_set.runs(self.sets[name].kind, splits)
        return dict(zip(runs["scan_id"], runs["subject"], strict=True))


def without_padding(batch: WindowBatch) -> WindowBatch:
    """The rows that count."""
    return batch.rows(torch.nonzero(batch.weight > 0)[:, 0].tolist())


def report_run(
    config: PretrainConfig,
    sets: Mapping[str, OpenedSet],
    *,
    weights: Path,
    tables: Mapping[str, Mapping[str, Sequence[RegionScore]]],
    mlflow_run_id: str | None,
) -> tuple[dict[str, object], list[Section]]:
    """The numbers of the report on weights in a local file, and its part of the page; its files are in the run folder
    and in MLflow."""
    task = build_task(config, sets)
    task.load_state_dict(load_file(weights))
    trained_run = TrainedRun(task.to(own_device()).eval(), config, sets, own_device())
    Path(config.run.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.run.scratch) as scratch:
        folder = Path(scratch)
        numbers = analyse(trained_run, folder)
        if tables:
            alignments = {name: opened.alignment for name, opened in sets.items()}
            (folder / RECONSTRUCTION).write_text(as_csv(tables, alignments))
        store = store_for(config.run.folder)
        for path in sorted(folder.iterdir()):
            store.put(f"{FOLDER}/{path.name}", path)
        log_folder(folder, name=FOLDER, run_id=mlflow_run_id, config=config.train.tracking)
        return numbers, page_sections(trained_run, tables, folder)


def page_sections(
    trained_run: TrainedRun, tables: Mapping[str, Mapping[str, Sequence[RegionScore]]], folder: Path
) -> list[Section]:
    """Scores, then for every set its regions, one window with its guesses, and the pictures that are in the folder."""
    sections = [score_section(tables)] if tables else []
    for name, opened in trained_run.sets.items():
        for split in list(tables)[:1]:
            sections += [region_section(name, tables[split][name]), example_section(trained_run, name, split)]
        pictures = [as_image(path.read_bytes(), label=path.stem) for path in sorted(folder.glob(f"{name}_*.png"))]
        if pictures:
            text = f"Region outlines are those of {opened.geometry.atlas.name}. The maps are NIfTI files in {FOLDER}/."
            sections.append(Section(f"Maps and region contributions of {name}", text=text, figures=pictures))
    return sections


def example_section(trained_run: TrainedRun, name: str, split: str) -> Section:
    """The first window of a split: what was hidden, and what was guessed."""
    geometry = trained_run.sets[name].geometry
    batch = next(trained_run.batches(name, split, 1))
    with torch.no_grad():
        found = trained_run.task.reconstruct(batch)
    example = Example(
        truth=found.truth[0].cpu().numpy(),
        guessed=found.guessed[0].cpu().numpy(),
        is_hidden=found.is_scored[0].cpu().numpy(),
        seconds=float(batch.repetition_time_s[0]),
        region_of=geometry.atlas.labels,
        names=geometry.atlas.names,
    )
    figures = [draw_example(example, geometry.space)] if geometry.space.kind == "volume" else []
    if len(example.truth) > 1:
        figures.append(draw_courses(example))
    text = f"Scan {batch.scan_ids[0]} of split {split}. Grey: hidden. Time courses are means over hidden voxels."
    return Section(f"A window of {name} and its guesses", text=text, figures=figures)


def analyse(trained_run: TrainedRun, folder: Path) -> dict[str, object]:
    """The numbers of everything that `report` asks for, by set; files go below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report, numbers = trained_run.config.report, {}
    with torch.no_grad():
        for name in trained_run.sets:
            started = time.monotonic()
            found: dict[str, object] = {}
            if report.maps.num_samples != 0:
                found["maps"] = make_maps(trained_run, name, folder)
            if report.contribution.num_samples > 0:
                found["contribution"] = make_contributions(trained_run, name, folder)
            if report.probes.num_samples > 0:
                found["probes"] = make_probes(trained_run, name)
            numbers[name] = found | {"seconds": round(time.monotonic() - started, 1)}
    return dict(numbers)


def make_maps(trained_run: TrainedRun, name: str, folder: Path) -> dict[str, object]:
    """Maps of each final split: r2, error and number of values; of volumes as NIfTI with a picture, else by vertex."""
    opened = trained_run.sets[name]
    space, labels = opened.geometry.space, opened.geometry.atlas.labels
    numbers: dict[str, object] = {}
    for split in trained_run.config.train.evaluation.final_splits:
        batches = trained_run.batches(name, split, trained_run.config.report.maps.num_samples)
        maps = voxel_maps((trained_run.task.reconstruct(batch) for batch in batches), space.num_voxels)
        stem = f"{name}_{split}"
        if space.kind == "volume":
            for key, values in (("r2", maps.r2), ("rmse", maps.rmse), ("values", maps.num_values)):
                write_nifti(values, space, folder / f"{stem}_{key}.nii.gz")
            title = f"{name}: hidden voxels of {maps.num_windows} windows of split {split}"
            draw_maps(maps, space, labels, title=title, path=folder / f"{stem}_maps.png")
        else:
            np.savez_compressed(folder / f"{stem}_maps.npz", r2=maps.r2, rmse=maps.rmse, values=maps.num_values)
        known = maps.r2[np.isfinite(maps.r2)]
        numbers[split] = {
            "windows": maps.num_windows,
            "voxels": len(known),
            "median_r2": float(np.median(known)) if len(known) else None,
            "worse_than_mean": float((known < 0).mean()) if len(known) else None,
        }
    return numbers


def make_contributions(trained_run: TrainedRun, name: str, folder: Path) -> dict[str, object]:
    """What each region's visibility adds to the guess of the others: CSV, picture, and the regions that stand out."""
    config, opened = trained_run.config.report.contribution, trained_run.sets[name]
    split = trained_run.config.train.evaluation.final_splits[0]
    batches = list(trained_run.batches(name, split, config.num_samples))
    every, regions = patches_by_region(opened)
    num_patches = opened.geometry.layout.num_patches
    hidden = contexts(every, num_patches, num_contexts=config.num_contexts, seed=config.seed)
    nothing_more = torch.from_numpy(hidden[0]).to(trained_run.device)
    total = np.concatenate([trained_run.task.patch_errors(batch, nothing_more)[1].double().cpu() for batch in batches])

    def errors(is_hidden: np.ndarray) -> np.ndarray:
        chosen = torch.from_numpy(is_hidden).to(trained_run.device)
        return np.concatenate([trained_run.task.patch_errors(batch, chosen)[0].double().cpu() for batch in batches])

    centres = opened.geometry.layout.centres_mm.astype(np.float64)
    rows = contributions(
        Experiment(errors, total, hidden),
        regions,
        np.linalg.norm(centres[:, None] - centres[None], axis=2),
        subjects=[subject for batch in batches for subject in batch.subjects],
        config=config,
        intervals=trained_run.config.report.intervals,
    )
    write_contributions(rows, folder / f"{name}_contribution.csv", alignment=opened.alignment)
    title = f"{name}: region contribution, {len(total)} windows of split {split}"
    draw_contributions(rows, title=title, path=folder / f"{name}_contribution.png")
    significant = sorted((row for row in rows if row.is_significant), key=lambda row: -row.contribution.value)
    return {
        "split": split,
        "windows": len(total),
        "tested": sum(row.p is not None for row in rows),
        "untested": sum(row.p is None for row in rows),
        "significant": {row.region: row.contribution.value for row in significant},
    }


def patches_by_region(opened: OpenedSet) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The patches of every region by majority, unlabelled tissue's pseudo-regions included; and the atlas's own."""
    geometry = opened.geometry
    membership = geometry.atlas.membership(geometry.layout, geometry.space)
    owner = membership.shares.argmax(axis=1)
    every = [np.flatnonzero(owner == column) for column in range(len(membership.region_ids))]
    named = {
        geometry.atlas.names[int(label)]: every[column]
        for column, label in enumerate(membership.region_ids)
        if membership.is_named[column]
    }
    return [patches for patches in every if len(patches)], named


def write_contributions(rows: list[Contribution], path: Path, *, alignment: str) -> None:
    """One line a region."""
    lines = []
    for row in rows:
        line = dataclasses.asdict(row)
        each = row.contribution
        line |= {"low": plain(each.low), "high": plain(each.high), "contribution": plain(each.value)}
        line |= {"alignment": alignment}
        lines.append(line)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def make_probes(trained_run: TrainedRun, name: str) -> dict[str, object]:
    """How well site and repetition time are read from the embedding, beside the embedding of untrained weights."""
    labels = subject_labels(trained_run, name)
    untrained = build_task(trained_run.config, trained_run.sets)
    for stem in untrained.encoder.stems:
        trained = trained_run.task.encoder.stem(stem)
        untrained.set_voxel_statistics(stem, trained.voxel_offset.cpu(), trained.voxel_scale.cpu())
    encoders = {
        "trained": trained_run,
        "untrained": dataclasses.replace(trained_run, task=untrained.to(trained_run.device).eval()),
    }
    found: dict[str, object] = {
        "time_in": trained_run.config.model.encoder.time_in,
        "same_question": same_question({key: list(values.values()) for key, values in labels.items()}),
    }
    for encoder, each in encoders.items():
        subjects, embeddings = embedded(each, name)
        found[encoder] = {
            label: dataclasses.asdict(
                probe(embeddings, [of_subject[one] for one in subjects], trained_run.config.report.probes)
            )
            for label, of_subject in labels.items()
        }
    return found


def embedded(trained_run: TrainedRun, name: str) -> tuple[list[str], np.ndarray]:
    """Subjects, and the mean over each one's windows of the mean token of the whole window, nothing hidden."""
    stem_name = trained_run.task.set_named(name).stem_name
    rows, subjects = [], []
    for split in PROBED_SPLITS:
        for batch in trained_run.batches(name, split, trained_run.config.report.probes.num_samples):
            tokens = trained_run.task.encoder.encode_windows(
                batch.values, batch.is_measured, batch.repetition_time_s, stem_name
            )
            rows.append(tokens.mean(dim=1).double().cpu().numpy())
            subjects += batch.subjects
    return by_subject(np.concatenate(rows), subjects)


def subject_labels(trained_run: TrainedRun, name: str) -> dict[str, Mapping[str, str | None]]:
    """Site and repetition time of each subject; None where not known, or where a subject's scans differ."""
    opened = trained_run.sets[name]
    runs = opened.shard_set.runs(opened.kind, PROBED_SPLITS)
    times = [f"{time:.3f} s" if time > 0 else None for time in runs["repetition_time_s"]]  # NaN and 0: none, or a T1
    sites = [site if isinstance(site, str) and site else None for site in runs["site"]]
    found = {}
    for label, values in (("site", sites), ("repetition_time", times)):
        of_subject: dict[str, set[str | None]] = {}
        for subject, value in zip(runs["subject"], values, strict=True):
            of_subject.setdefault(subject, set()).add(value)
        found[label] = {subject: next(iter(one)) if len(one) == 1 else None for subject, one in of_subject.items()}
    return dict(found)
