"""The console script: `callosum` lists the commands, `callosum pretrain ...` is `python -m pretrain ...`."""

import ast
import difflib
import runpy
import sys
from pathlib import Path

import configs
from callosum import __version__
from configs.entry import command_names
from configs.words import aligned

USAGE = f"""callosum {__version__}: distributed foundation-model pretraining on brain MRI

  callosum <command> [overrides]     the same as python -m <command> [overrides]
  callosum <command> --help          what it needs, an example, and the keys people change

Commands:
{{commands}}"""


def purpose(name: str) -> str:
    """The first line of a command's help, read without importing the command."""
    path = Path(configs.__file__).parents[1].joinpath(*name.split("."))
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def main() -> None:
    """Runs the command that the first word names, as `python -m` would."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("--help", "-h"):
        print(USAGE.format(commands=aligned([(f"  {name}", purpose(name)) for name in command_names()])))
    elif first in ("--version", "-V"):
        print(__version__)
    elif first not in command_names():
        close = difflib.get_close_matches(first, command_names(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        print(f"callosum: unknown command {first}; {hint}'callosum --help' lists all", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = sys.argv[1:]
        runpy.run_module(first, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
