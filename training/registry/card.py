"""The model card: MODEL_CARD.md of a bundle, and what MLflow says of the registered model. Knows no task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FILE = "MODEL_CARD.md"
PHANTOM = (
    "**Phantom data: a program made the scans this model learned from. Its numbers say nothing about any person.**"
)
LICENCE = (
    "Code: Apache-2.0. The weights were learned from the scans named above: the terms under which those may be used "
    "hold for the weights too."
)


@dataclass(frozen=True)
class TrainingSet:
    """What a card says of a set that a model learned from; `facts` are text by name: subjects, sites, spaces."""

    name: str
    location: str
    fingerprint: str
    facts: Mapping[str, str]
    is_phantom: bool


@dataclass(frozen=True)
class About:
    """What a study says of its model: what it is, what for, and what it cannot do, as sentences."""

    what: str
    use: str
    limits: str
    sets: Sequence[TrainingSet]


def model_card(
    about: About,
    *,
    model: str,
    verdict: str,
    results: Sequence[Sequence[str]],
    num_tested: int,
    num_seen: int | None,
) -> str:
    """The card as Markdown. `model` is the address to load it from, `results` a table whose first row is its head;
    `num_seen` subjects went into the weights, None if that is unknown."""
    facts = [{"location": each.location, "fingerprint": each.fingerprint, **each.facts} for each in about.sets]
    rows = dict.fromkeys(name for each in facts for name in each)
    data = [
        ["", *(each.name for each in about.sets)],
        *([name, *(each.get(name, "–") for each in facts)] for name in rows),
    ]
    seen = (
        "It is not known which subjects the weights have seen."
        if num_seen is None
        else f"The weights have seen {num_seen} subjects, of earlier training too; seen_subjects.txt has their hashes."
    )
    parts = [
        PHANTOM if any(each.is_phantom for each in about.sets) else "",
        f"# {model.removeprefix('models:/')}",
        about.what,
        f"## Intended use\n\n{about.use}",
        f"## Limits\n\n{about.limits}",
        f"## Training data\n\n{table(data)}",
        seen,
        f"## Results\n\n{verdict}\n\n{table(results)}",
        f"Scored on {num_tested} subjects of the final split; brackets are bootstrap intervals over subjects.",
        f"## How to load\n\n{loading(model)}",
        f"## Licence\n\n{LICENCE}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; its first row is the head."""
    lines = [" | ".join(cell.replace("|", "/") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join(["---"] * len(rows[0])), *lines[1:]])


def loading(model: str) -> str:
    """Code that loads a bundle folder; or a registered model, in three ways."""
    here = f'import callosum\nmodel = callosum.load("{model}")  # a torch module; model.embed(paths) embeds scans'
    if not model.startswith("models:/"):
        return f"```python\n{here}\n```"
    elsewhere = f'import mlflow\nmodel = mlflow.pyfunc.load_model("{model}")  # without this repository'
    serve = f"mlflow models serve --model-uri {model} --env-manager local"
    return f"```python\n{here}\n\n{elsewhere}\n```\n\n```bash\n{serve}\n```"
