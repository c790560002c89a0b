"""What every `python -m <part>` command does: compose YAML and overrides, parse, then validate, plan or run.

The only module that uses Hydra: its compose API, so that one command has the same flags everywhere and no run folder.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from configs.parse import ConfigError, parse, refuse

Schema = TypeVar("Schema")

OUR_PACKAGES = {"brain_models", "data_sharding", "training", "pretrain", "finetune", "cluster", "configs", "reports"}
FLAGS = {
    "--help": "this page",
    "--validate": "check everything that can be checked without starting, report all problems, exit 2 if any",
    "--plan": "print what would happen (samples, steps, bytes, memory) and do nothing",
    "--show": "print the composed configuration as YAML",
}
FLAGS_OF_TRAINING = {"--profile": "trace a few steps of training with the torch profiler, into <run.folder>/profile"}
PROFILED = "train.profile.num_steps=3"


def compose(part: str, overrides: list[str]) -> dict[str, Any]:
    """Returns the plain mapping composed from configs/<part>.yaml and Hydra overrides such as `model=tiny`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(config_dir=str(Path(__file__).parent.resolve()), version_base="1.3"):
            composed = hydra_compose(config_name=part, overrides=overrides)
            return OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        hint = f"'python -m {command_name()} --show' prints every key, --help an example"
        raise ConfigError(f"{_in_our_words(error, part)}; {hint}") from error


def _in_our_words(error: Exception, part: str) -> str:
    """What was wrong with an override, and the key or choice that was probably meant."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as key=value; put a value with spaces or signs in quotes inside the "
            "shell's (\"key='value'\"), and write $HOME for ~"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: there is none of that name; choose one of {', '.join(error.options)}"
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        return f"{unknown[1]}: unknown key{_meant(unknown[1], part)}"
    return f"configs/{part}.yaml with these overrides: {error}"


def _meant(key: str, part: str) -> str:
    groups = [folder.name for folder in Path(__file__).parent.iterdir() if any(folder.glob("*.yaml"))]
    known = [name for name in _dotted(compose(part, [])) if name != key] + groups
    same_end = [name for name in known if name.endswith(f".{key}") or key.endswith(f".{name}")]
    close = same_end or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f", did you mean {' or '.join(close)}?" if close else ""


def _dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def main(
    *,
    part: str,
    schema: type[Schema],
    help_text: str,
    run: Callable[[Schema], object],
    validate: Callable[[Schema], list[str]],
    plan: Callable[[Schema], str],
) -> None:
    """Runs one command line of `python -m <part>`; exits 2 with the message for an error the user can mend."""
    arguments = sys.argv[1:]
    known = _flags_of(schema)
    if "--help" in arguments or "-h" in arguments:
        print(_help_page(help_text, known))
        return
    flags = {argument for argument in arguments if argument.startswith("-")}
    with told_to_users():
        if unknown := flags - known.keys():
            raise ConfigError(f"unknown flag {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        overrides = [argument for argument in arguments if argument not in flags]
        raw = compose(part, [*overrides, PROFILED] if "--profile" in flags else overrides)
        if "--show" in flags:
            import yaml

            print(yaml.safe_dump(raw, sort_keys=False), end="")
            return
        config = parse(raw, schema)
        refuse(validate(config))
        if "--plan" in flags:
            print(plan(config))
        elif "--validate" in flags:
            print(f"python -m {command_name()}: the configuration is valid")
        else:
            run(config)


@contextmanager
def told_to_users() -> Iterator[None]:
    """Prints an error of ours with its name and exits 2, or with the `exit_status` of its class; any other passes with
    its traceback. Ctrl-C exits 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on from what was finished", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:  # as all of ours are
        if not is_for_users(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 2))


def command_name() -> str:
    """Returns what `python -m` was given, e.g. data_sharding.phantom."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else "<part>"


def is_for_users(error: BaseException) -> bool:
    """Returns True when the error's class is one of ours: its message says what to do, a traceback would bury it."""
    return type(error).__module__.split(".")[0] in OUR_PACKAGES


def _flags_of(schema: type) -> dict[str, str]:
    """What every command takes, and what only one that trains does: its schema has a section `train`."""
    trains = any(field.name == "train" for field in dataclasses.fields(schema))
    return FLAGS | FLAGS_OF_TRAINING if trains else FLAGS


def _help_page(help_text: str, known: dict[str, str]) -> str:
    width = max(map(len, known))
    flags = "\n".join(f"  {flag:<{width}}  {meaning}" for flag, meaning in known.items())
    return (
        f"{help_text.strip()}\n\nFlags:\n{flags}\n\nEvery other argument is a Hydra override: key=value or group=name."
    )
