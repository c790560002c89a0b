"""The tutorial notebook runs from its first cell to its last, in an empty folder. Slow: make test-demo."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import composed

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
SHELL = "import subprocess\nsubprocess.run({command!r}, shell=True, check=True)"


def script(notebook: dict) -> str:
    """The code cells one after another; a cell that begins with ! is run by the shell, and must succeed."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return "\n".join(SHELL.format(command=cell[1:]) if cell.startswith("!") else cell for cell in cells)


def test_the_notebook_is_saved_without_outputs_and_has_lines_that_fit() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    assert max(len(line.rstrip()) for cell in notebook["cells"] for line in cell["source"]) <= 120


@pytest.mark.demo
def test_the_notebook_runs_and_ends_with_a_table_of_regions(tmp_path: Path) -> None:
    code = script(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(regions.to_string())"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [similarities] = [re.findall(r"^\d+ .* (-?[01]\.\d+)$", done.stdout, flags=re.MULTILINE)]
    assert len(similarities) >= 50
    assert all(-1 <= float(value) <= 1 for value in similarities)
    assert len(set(similarities)) > 10


def test_the_commands_of_the_notebook_compose() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    commands = [cell.removeprefix("!python -m ").replace("\\\n", " ") for cell in cells if cell.startswith("!")]
    assert len([list(composed(command)) for command in commands]) == 3
