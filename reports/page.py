"""The page of a finished run: one HTML file that needs no other file and no network.

Every study's report is this page; it shows what it is given and knows no metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Literal

import jinja2

from brain_models.bundle import code_commit
from reports.methods import Methods


@dataclass(frozen=True)
class Notice:
    """Something a reader must know beside the numbers; an alarm says that they do not mean what they seem to."""

    kind: Literal["alarm", "warning", "remark"]
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page: a table whose first row is its head, then text, then figures as SVG text. `row_ids` are what
    links name the table's rows by, without the head."""

    title: str
    table: Sequence[Sequence[str]] = ()
    text: str = ""
    figures: Sequence[str] = ()
    row_ids: Sequence[str] = ()


@dataclass(frozen=True)
class Origin:
    """When a page was made, by which command line, and with which git commit of this code."""

    date: str
    command: str
    commit: str


def origin_of(command: str | None) -> Origin:
    """The origin of a page that is made now; None: called by Python."""
    return Origin(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", command or "Python", code_commit())


@dataclass(frozen=True)
class Page:
    """Everything the page shows; `lineage` says where the numbers come from."""

    title: str
    verdict: str
    notices: Sequence[Notice]
    sections: Sequence[Section]
    lineage: Mapping[str, str]
    origin: Origin
    methods: Methods


def render(page: Page) -> str:
    """The page as HTML text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("reports").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page)
