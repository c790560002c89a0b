"""The front end of every command: compose YAML and overrides, parse, then validate, plan or run.

The only module that uses Hydra, by its compose API. A command module offers `command()`, which imports what the command
needs, so that `--help` imports nothing else.
"""

import difflib
import importlib
import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from brain_models.errors import UserError
from configs.parse import ConfigError, parse, refuse
from configs.words import aligned

Schema = TypeVar("Schema")

FLAGS = {
    "--help": "print this page",
    "--validate": "check everything that can be checked without starting, report all problems, exit 2 if any",
    "--plan": "print what would happen (samples, steps, bytes, memory) and do nothing",
    "--show": "print the composed configuration as YAML",
    "--verbose": "of a training: print every tracked number (run.verbose=true)",
}

# What other projects call a key.
SYNONYMS = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "epochs": "steps", "gpus": "num_workers"}


@dataclass(frozen=True)
class Command(Generic[Schema]):
    """What a command does with its configuration; `configs/<name>.yaml` holds the values."""

    schema: type[Schema]
    run: Callable[[Schema], int | None]  # returns the exit status, None for 0
    plan: Callable[[Schema], str]  # returns what would happen, one line each
    validate: Callable[[Schema], list[str]] = lambda config: []  # returns all problems
    needs: Callable[[Schema], Any] | None = None  # returns cluster.config.Needs; None: cannot be sent to a cluster


def main(
    name: str, help_text: str | None, command: Callable[[], Command[Schema]], *, positional: tuple[str, ...] = ()
) -> None:
    """Runs one command line of `python -m <name>` and exits.

    Words without '=' fill the keys `positional` in order; a last one that ends in '...' takes all words that follow.
    Exits 2 with the message for an error the user can fix, 130 at Ctrl-C.
    """
    flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    words = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if not {"--help", "-h"}.isdisjoint(flags):
        print(_help_page(help_text or ""))
        return
    with user_errors():
        if unknown := sorted(set(flags) - FLAGS.keys()):
            keys = ", ".join(f"{flag.lstrip('-').partition('=')[0]}=..." for flag in unknown)
            raise ConfigError(
                f"unknown flag {', '.join(unknown)}; known: {', '.join(FLAGS)}; a key has no dashes: {keys}"
            )
        overrides, values = _split(words, positional)
        raw = compose(name, overrides + ["run.verbose=true"] * ("--verbose" in flags)) | values
        if "command" in (raw.get("run") or {}):
            raw["run"]["command"] = shlex.join(["python", "-m", name, *sys.argv[1:]])
        if "--show" in flags:
            import yaml

            print(yaml.safe_dump(raw, sort_keys=False), end="")
            return
        this = command()
        config = _checked(this, raw)
        if "--plan" in flags:
            print(this.plan(config))
        elif "--validate" in flags:
            this.plan(config)  # opens what the run would read
            print(f"python -m {name}: the configuration is valid")
        else:
            sys.exit(this.run(config))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a UserError into its message and its exit status; any other error passes with its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


def load(name: str, words: list[str]) -> tuple[Command, Any]:
    """Returns a command by its name and its checked configuration; ConfigError for what it refuses."""
    if name not in command_names():
        close = difflib.get_close_matches(name, command_names(), n=1)
        meant = f", did you mean {close[0]}?" if close else f"; choose one of {', '.join(command_names())}"
        raise ConfigError(f"{name}: unknown command{meant}")
    overrides, values = _split(words, getattr(_module(name), "POSITIONAL", ()))  # as its call of main() says
    command = command_named(name)
    return command, _checked(command, compose(name, overrides) | values)


def command_names() -> list[str]:
    """Returns every command, in alphabetical order: each has its values in configs/<name>.yaml."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def command_named(name: str) -> Command:
    """Returns the command that `python -m <name>` runs."""
    return _module(name).command()


def _module(name: str) -> Any:
    is_package = importlib.util.find_spec(name).submodule_search_locations is not None  # type: ignore[union-attr]
    return importlib.import_module(f"{name}.__main__" if is_package else name)


def combinations(overrides: list[str]) -> list[list[str]]:
    """Returns overrides without choices: of `a=1,2 b=3` these are [a=1, b=3] and [a=2, b=3]."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ConfigError(_explain(error, "")) from error
    choices = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [str(each.input_line)]
        for each in parsed
    ]
    return [list(each) for each in itertools.product(*choices)]


def _checked(command: Command[Schema], raw: Mapping[str, Any]) -> Schema:
    config = parse(raw, command.schema)
    refuse(command.validate(config))
    return config


def _split(words: list[str], positional: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """Overrides, and the values of positional keys."""
    overrides: list[str] = []
    values: dict[str, Any] = {}
    free = list(positional)
    for index, word in enumerate(words):
        if free and free[0].endswith("..."):
            values[free[0].removesuffix("...")] = words[index:]
            break
        if free and "=" not in word:
            values[free.pop(0)] = word
        else:
            overrides.append(word)
    return overrides, values


def compose(name: str, overrides: list[str]) -> dict[str, Any]:
    """Returns the plain mapping composed from configs/<name>.yaml and Hydra overrides such as `model=tiny`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(config_dir=str(Path(__file__).parent.resolve()), version_base="1.3"):
            composed = hydra_compose(config_name=name, overrides=overrides)
            return OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        hint = f"'python -m {name} --show' prints every key, --help an example"
        explained = _explain(error, name)
        raise ConfigError(f"{explained}{' ' if explained.endswith('?') else '; '}{hint}") from error


def _explain(error: Exception, name: str) -> str:
    """What is wrong with an override, and the key or choice that was probably meant."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as key=value; put a value with spaces or signs in quotes inside the "
            "shell's (\"key='value'\"), and write $HOME for ~"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: unknown choice; choose one of {', '.join(error.options)}"
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        return f"{unknown[1]}: unknown key{_suggestion(unknown[1], name)}"
    return f"configs/{name}.yaml with these overrides: {error}"


def _suggestion(key: str, name: str) -> str:
    groups = [folder.name for folder in Path(__file__).parent.iterdir() if any(folder.glob("*.yaml"))]
    known = [dotted for dotted in _dotted(compose(name, [])) if dotted != key] + groups
    *group, last = key.split(".")
    key = ".".join([*group, SYNONYMS.get(last, last)])
    same_end = [dotted for dotted in known if dotted.endswith(f".{key}") or key.endswith(f".{dotted}")]
    close = same_end or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f", did you mean {' or '.join(close)}?" if close else ""


def _dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def _help_page(help_text: str) -> str:
    flags = aligned([(f"  {flag}", meaning) for flag, meaning in FLAGS.items()])
    return f"{help_text.strip()}\n\nFlags:\n{flags}\n\nAny other key=value or group=name is a Hydra override."
