"""What a comparison of encoders would do, everything wrong with its configuration, and the run itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.config import Needs
from cluster.storage.stores import store_for
from finetune import planning
from finetune.backbone import fetch_backbone, local_bundles
from finetune.compare.cells import arms_of, cell_config, cells_of, runs_of, slug
from finetune.compare.comparison import FILES, as_markdown, compare, log_to_mlflow, metric_of, read_answer, write
from finetune.config import CompareConfig, FinetuneConfig
from finetune.tasks import task_module
from training.grid import is_finished, run_all
from training.registry.seen_subjects import overlap


def run(config: CompareConfig) -> None:
    runs = runs_of(config)
    run_all([*runs.values()])
    found = compare(config, {cell: read_answer(store_for(each.folder), config) for cell, each in runs.items()})
    folder = Path(config.run.scratch) / f"{slug(config.run.name)}-comparison"
    write(found, folder)
    store = store_for(config.run.folder)
    for name in FILES:
        store.put(name, folder / name)
    log_to_mlflow(found, folder, config)
    print(f"\n{as_markdown(found)}\n{config.run.folder.rstrip('/')}/comparison.md, comparison.csv, comparison.png")


def validate(config: CompareConfig) -> list[str]:
    """Problems of the comparison itself; if there are none, those of fine-tuning each encoder."""
    problems = arm_problems(config)
    if problems:
        return problems
    first_of = {cell.encoder: cell for cell in reversed(cells_of(config))}
    for cell in first_of.values():
        run_config = cell_config(config, cell)
        found = planning.validate(run_config) or metric_problems(config)
        if not found:
            unscored = task_module(config.task).unscored_problems(run_config, metric_of(config).name)
            found = overlap_problems(run_config) + unscored
        problems += found
    return list(dict.fromkeys(problems))


def metric_problems(config: CompareConfig) -> list[str]:
    """A metric that the task does not declare."""
    declared = [metric.name for metric in task_module(config.task).metrics(config)]
    if config.metric in ("first", *declared):
        return []
    return [f"metric: {config.metric} is none of the task's {', '.join(declared)}; name one of them, or 'first'"]


def arm_problems(config: CompareConfig) -> list[str]:
    """Arms, seeds and modes that make no comparison."""
    given = config.encoders
    problems = []
    if len(given) < 2:
        problems.append(f"encoders: {len(given)} arm; give at least two")
    if isinstance(given, list) and (twice := sorted({encoder for encoder in given if given.count(encoder) > 1})):
        problems.append(f"encoders: {', '.join(twice)} is there twice; name arms: encoders={{a: [...], b: [...]}}")
    if isinstance(given, dict) and (len({len(arm) for arm in given.values()}) != 1 or not all(given.values())):
        counts = ", ".join(f"{name} {len(arm)}" for name, arm in given.items())
        problems.append(f"encoders: {counts}; give every arm equally many, one a pretraining seed, in the same order")
    if config.encoder != "first" and config.encoder not in given:
        problems.append(f"encoder: {config.encoder} is none of the arms {', '.join(given)}; name one, or 'first'")
    if len({slug(name) for name in given}) < len(set(given)):
        problems.append(f"encoders: {', '.join(given)} are the same in letters and digits; name arms apart")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        problems.append(f"seeds: {config.seeds}; give at least one, each once")
    if not config.modes:
        problems.append("modes: none; give at least one")
    if config.bootstrap.num_resamples < 2:
        problems.append(f"bootstrap.num_resamples: {config.bootstrap.num_resamples}; give at least 2")
    return problems


def overlap_problems(config: FinetuneConfig) -> list[str]:
    """An encoder that was pretrained on test subjects; one that does not say is marked in the table instead."""
    seen = fetch_backbone(config).seen
    tested = task_module(config.task).tested_subjects(config)
    shared = overlap(tested, seen or set())
    if not shared:
        return []
    named = f"{', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}"
    return [
        f"encoder={config.encoder}: was pretrained on {len(shared)} of {len(tested)} test subjects ({named}); pretrain "
        "on the train split of this set, or leave it out"
    ]


def plan(config: CompareConfig) -> str:
    """The cells and how many are done, and what one of them does."""
    runs = runs_of(config)
    num_finished = sum(map(is_finished, runs.values()))
    last, last_run = [*runs.items()][-1]
    arms = arms_of(config)
    shape = (
        f"{len(arms)} arms x {len(next(iter(arms.values())))} encoders x {len(config.modes)} modes x "
        f"{len(config.seeds)} seeds"
    )
    lines = [f"cells           {len(runs)}: {shape}; {num_finished} finished", f"reference       {next(iter(arms))}"]
    return "\n".join([*lines, f"each, as {last.folder}:", planning.plan(last_run.config)])


def needs(config: CompareConfig) -> Needs:
    """What one cell needs, with the inputs of all and the folder of the comparison."""
    cell = planning.needs(cell_config(config, cells_of(config)[0]))
    encoders = [encoder for arm in arms_of(config).values() for encoder in arm]
    inputs = {**cell.inputs, **local_bundles(encoders)}
    return replace(cell, results=config.run.folder, inputs=inputs)
