"""The check of pages in a browser can fail: a page that is too wide or complains is told from one that does not."""

from __future__ import annotations

from pathlib import Path

from reports.methods import methods
from reports.page import Notice, Origin, Page, Section, render
from tests.browser import browser, needs_chromium

WIDTHS = (390, 1280)


@needs_chromium
def test_a_page_that_overflows_or_complains_is_found_and_long_words_and_wide_tables_fit(tmp_path: Path) -> None:
    bad = '<img src="nothing.png"><div style="width: 900px">x</div><script>console.error("meant"); nothing()</script>'
    (tmp_path / "bad.html").write_text(f"<!doctype html><title>x</title><body>{bad}</body>")
    long = "s3://bucket/" + "a_long_name_without_a_break" * 20
    table = [[f"column {number}" for number in range(30)], ["a value of some length"] * 30]
    page = Page(
        title=f"Title {long}",
        verdict=long,
        notices=[Notice("alarm", long)],
        sections=[Section(f"Section {long}", table, long, ['<svg width="2000" height="10"></svg>'])],
        lineage={"where": long},
        origin=Origin("today", f"python -m finetune {long}", "0123"),
        methods=methods([f"{long} [@ants]."]),
    )
    (tmp_path / "good.html").write_text(render(page), encoding="utf-8")
    with browser() as chromium:
        found = chromium.look(tmp_path / "bad.html", 390)
        assert (found.window_width, found.content_width > 900) == (390, True)
        for text in ("meant", "nothing is not defined", "ERR_FILE_NOT_FOUND"):
            assert any(text in complaint for complaint in found.complaints), (text, found.complaints)
        for width in WIDTHS:
            seen = chromium.look(tmp_path / "good.html", width)
            assert (seen.complaints, seen.window_width) == ([], width)
            assert seen.content_width == width
