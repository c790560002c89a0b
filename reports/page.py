"""The page of a finished run: one HTML file that needs no other file and no network.

Every study's report is this page; it shows what it is given and knows no metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import jinja2


@dataclass(frozen=True)
class Notice:
    """Something a reader must know beside the numbers; an alarm says that they do not mean what they seem to."""

    kind: Literal["alarm", "warning", "remark"]
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page: a table whose first row is its head, then text, then figures as SVG text."""

    title: str
    table: Sequence[Sequence[str]] = ()
    text: str = ""
    figures: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """Everything the page shows, in this order; `lineage` says where the numbers come from."""

    title: str
    verdict: str
    notices: Sequence[Notice]
    sections: Sequence[Section]
    lineage: Mapping[str, str]


def render(page: Page) -> str:
    """The page as HTML text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("reports").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page)
