"""The documentation agrees with the code: its commands compose, its links lead somewhere, its code runs."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from configs.entry import combinations, command_named, compose
from configs.parse import parse
from data_sharding.config import ShardingConfig
from data_sharding.phantoms.fields import bold_values, grid, t1_values, write_volume
from data_sharding.sources import find
from data_sharding.write.prepare import make_space
from tests import api_pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
CHECKED_ELSEWHERE = {"pretraining.md"}  # tests/pretrain/test_pretrain_docs.py
WRAPPERS = {"cluster.submit", "cluster.preflight", "training.grid"}  # commands whose arguments are a command
POSITIONAL = {
    "data_sharding.report": ["set"],
    "data_sharding.verify": ["set"],
    "training.pull": ["name", "folder"],
    "training.runs": ["tracking"],
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every `python -m <command> ...` and `callosum <command> ...` of a page's bash blocks, each on one line."""
    known = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:^|-- )(?:python -m|callosum) ([\w.]+)(?: (.*))?$", line.split("  #")[0]) for line in lines]
    return [f"{match[1]} {match[2] or ''}" for match in found if match is not None and match[1] in known]


def composed(command: str) -> Iterator[object]:
    """The configurations of a command, of a grid one for each combination; ConfigError for an unknown key."""
    name, *words = [word for word in shlex.split(command) if not word.startswith("-")]
    if name in WRAPPERS:
        inner = next(index for index, word in enumerate(words) if "=" not in word)
        compose(name, words[:inner])
        name, *words = words[inner:]
    values = dict(zip(POSITIONAL.get(name, []), words, strict=False))
    for overrides in combinations(words[len(values) :]):
        yield parse(compose(name, overrides) | values, command_named(name).schema)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if commands(page) and page.name not in CHECKED_ELSEWHERE],
    ids=lambda page: page.name,
)
def test_every_command_of_a_page_composes_into_its_schema(page: Path) -> None:
    for command in commands(page):
        assert list(composed(command)), command


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_a_page_but_a_table_row_is_longer_than_120_characters(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_index_names_every_page_once() -> None:
    linked = re.findall(r"\]\(([\w.]+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(page.name for page in DOCS.glob("*.md") if page.name != "README.md")
    assert "docs/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_every_python_block_of_a_page_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        assert ast.parse(block).body, block


def test_the_links_of_the_hcp_page_make_a_folder_that_the_bids_source_reads(tmp_path: Path) -> None:
    hcp, bids = tmp_path / "HCP_1200", tmp_path / "hcp_bids"
    top = hcp / "100307" / "MNINonLinear"
    affine, positions = grid(12.0)
    for number, direction in enumerate(("LR", "RL"), start=1):
        run = top / "Results" / f"rfMRI_REST{number}_{direction}"
        values = bold_values(positions, 20, (number,))
        write_volume(run / f"{run.name}_hp2000_clean.nii.gz", values, affine, code=4)
        write_volume(run / "brainmask_fs.2.nii.gz", np.ones(values.shape[:3], np.uint8), affine, code=4)
    for name in ("T1w_restore", "brainmask_fs"):
        write_volume(top / f"{name}.nii.gz", t1_values(positions, (3,)), affine, code=4)
    [script] = [block for block in blocks(DOCS / "hcp.md", "bash") if "ln -s" in block]
    script = script.replace("/data/HCP_1200", str(hcp)).replace("/data/hcp_bids", str(bids))
    subprocess.run(["bash", "-euc", script], check=True)
    [config] = composed(f"data_sharding source.root={bids} out={tmp_path}/set space=mni12")
    assert isinstance(config, ShardingConfig)
    contents = find(config.source, config.privacy, make_space(config.space, atlas_images=[]), accepts_raw=False)
    assert contents.refused == []
    assert [scan.scan_id for scan in contents.scans] == [
        "sub-100307_task-rest_dir-LR_run-1_bold",
        "sub-100307_task-rest_dir-RL_run-2_bold",
        "sub-100307_t1",
    ]
    assert [scan.repetition_time_s for scan in contents.scans] == [0.72, 0.72, 0.0]
    assert all(scan.brain_mask is not None for scan in contents.scans)


def text_of(node: ast.AST) -> str | None:
    """A string as it is written in the source, with ... for each value that is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def test_every_message_of_the_faq_is_one_that_the_code_can_print() -> None:
    packages = sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
    sources = [path for package in packages for path in package.rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    written = {text for node in nodes if (text := text_of(node)) is not None}
    headings = re.findall(r"^### `(.*)`$", (DOCS / "faq.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    patterns = {heading: ".*".join(map(re.escape, heading.split("..."))) for heading in headings}
    assert len(headings) >= 20
    assert [
        heading
        for heading, pattern in patterns.items()
        if not any(re.fullmatch(pattern + ".*", text, flags=re.DOTALL) for text in written)
    ] == []


def test_a_link_of_the_reference_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="x"></p><a href="b.html#y"></a><a href="#x"></a><a href="https://c.org"></a>'
    )
    (tmp_path / "b.html").write_text(
        '<p id="y"></p><a href="a.html#z"></a><script>href="${url}"</script><a href="c.html">'
    )
    assert api_pages.broken_links(tmp_path) == ["b.html: a.html#z", "b.html: c.html"]


@pytest.mark.demo
def test_the_reference_is_written_and_its_links_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.api_pages", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not resolve" not in done.stderr
    assert "IterableDataset" in (tmp_path / "callosum.html").read_text(encoding="utf-8")
