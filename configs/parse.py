"""Turns a composed, plain mapping into a part's own dataclasses, and refuses whatever does not fit.

Promise: every unknown, missing or mistyped key is reported at once, with its full name. Knows no part and no Hydra.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from brain_models.errors import UserError
from configs.words import counted

Schema = TypeVar("Schema")

MISSING = "???"  # how a required value is written in YAML
FREE = {"is_free": True}  # metadata of a field that cannot change a number of a run: where it executes, what it reports


class ConfigError(UserError):
    """A configuration that does not fit its schema; the message lists every problem."""


def parse(raw: Mapping[str, Any], schema: type[Schema]) -> Schema:
    """Returns an instance of the dataclass `schema` filled from `raw`.

    A schema may offer `missing(raw)`, which returns the problems of keys that are required together. An int is accepted
    where a float is expected; nothing else is converted. Raises ConfigError naming all problems.
    """
    problems: list[str] = []
    value = _parse_dataclass(raw, schema, key="", problems=problems)
    refuse(problems)
    return value


def flatten(config: Any, prefix: str = "", *, with_free: bool = True) -> dict[str, object]:
    """Every value of a configuration by its dotted key; lists stay values."""
    if isinstance(config, Mapping):
        values = dict(config)
    else:
        fields = [each for each in dataclasses.fields(config) if with_free or each.metadata != FREE]
        values = {each.name: getattr(config, each.name) for each in fields}
    flat: dict[str, object] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{name}.", with_free=with_free)
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def refuse(problems: list[str]) -> None:
    """Raises one ConfigError that lists all `problems`, if there are any."""
    if problems:
        raise ConfigError(_listed(problems))


def _listed(problems: list[str]) -> str:
    return f"{counted(len(problems), 'problem')} in the configuration:\n" + "\n".join(
        f"  - {problem}" for problem in problems
    )


def _parse_dataclass(raw: Any, schema: Any, *, key: str, problems: list[str]) -> Any:
    if not isinstance(raw, Mapping):
        problems.append(f"{key or 'configuration'}: expected a group of keys, got {raw!r}")
        return None
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for name in raw:
        if name not in fields:
            problems.append(f"{_join(key, name)}: unknown key{_suggestion(str(name), list(fields), key)}")
    if hasattr(schema, "missing"):
        problems += schema.missing(raw)
    values = {}
    for name, field in fields.items():
        full = _join(key, name)
        if name in raw:
            values[name] = _parse_value(raw[name], hints[name], key=full, problems=problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{full}: missing; add {full}=<{_type_name(hints[name])}>")
    if problems:
        return None
    return schema(**values)


def _parse_value(raw: Any, hint: Any, *, key: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(raw, str) and raw == MISSING:
        problems.append(f"{key}: required; add {key}=<{_type_name(hint)}>")
        return None
    if dataclasses.is_dataclass(hint):
        return _parse_dataclass(raw, hint, key=key, problems=problems)
    if origin in (Union, types.UnionType):
        return _parse_union(raw, arguments, key=key, problems=problems)
    if origin is Literal:
        if raw not in arguments:
            options = list(map(str, arguments))
            close = difflib.get_close_matches(str(raw).lower(), options, n=1)
            meant = f", did you mean {close[0]}?" if close else f"; give {key}=<{'|'.join(options)}>"
            problems.append(f"{key}: {raw!r} is not one of {', '.join(options)}{meant}")
        return raw
    if origin in (list, tuple):
        return _parse_sequence(raw, origin, arguments, key=key, problems=problems)
    if origin is dict:
        if not isinstance(raw, Mapping):
            problems.append(f"{key}: expected a group of keys, got {raw!r}")
            return None
        return {
            name: _parse_value(value, arguments[1], key=_join(key, name), problems=problems)
            for name, value in raw.items()
        }
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if hint is Any or (isinstance(raw, hint) and raw != "" and not (hint in (int, float) and isinstance(raw, bool))):
        return raw
    advice = _as_text(key, raw) if hint is str else f"; give {key.partition('[')[0]}=<{_type_name(hint)}>"
    problems.append(f"{key}: expected {_type_name(hint)}, got {raw!r} ({type(raw).__name__}){advice}")
    return None


def _as_text(key: str, raw: Any) -> str:
    """How to write a value as text that YAML reads as something else."""
    name, bracket, _ = key.partition("[")
    if raw == "":
        return f"; give {name}=<str>"
    return f"; give \"{name}=['{raw}']\"" if bracket else f"; give \"{name}='{raw}'\""


def _parse_union(raw: Any, options: tuple[Any, ...], *, key: str, problems: list[str]) -> Any:
    if raw is None and type(None) in options:
        return None
    tried = []
    for option in (option for option in options if option is not type(None)):
        attempt: list[str] = []
        value = _parse_value(raw, option, key=key, problems=attempt)
        if not attempt:
            return value
        tried.append((len(attempt), attempt))
    if len(tried) == 1 or isinstance(raw, Mapping):
        problems.extend(min(tried)[1])  # of several groups of keys, the one that fits best
    else:
        names = " or ".join(_type_name(option) for option in options)
        takes_list = isinstance(raw, str) and any(typing.get_origin(option) is list for option in options)
        advice = f"; give \"{key}=['{raw}']\"" if takes_list else ""
        problems.append(f"{key}: expected {names}, got {raw!r}{advice}")
    return None


def _parse_sequence(raw: Any, origin: Any, arguments: tuple[Any, ...], *, key: str, problems: list[str]) -> Any:
    if not isinstance(raw, list | tuple):
        problems.append(f"{key}: expected a list, got {raw!r}")
        return None
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(raw) != len(arguments):
            problems.append(f"{key}: expected {len(arguments)} values, got {len(raw)}")
            return None
        hints = arguments
    else:
        hints = (arguments[0],) * len(raw)
    items = [
        _parse_value(item, hint, key=f"{key}[{index}]", problems=problems)
        for index, (item, hint) in enumerate(zip(raw, hints, strict=True))
    ]
    return origin(items)


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _suggestion(name: str, known: list[str], key: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {_join(key, close[0])}?" if close else f"; known: {', '.join(known)}"


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
