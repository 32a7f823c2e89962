"""Read a TOML file plus dotted overrides into any frozen dataclass, and write one back; read JSON with named faults.

Each room owns its dataclass (frozen, keyword-only, slots; standard library) and this file knows none of them.
pydantic checks types and ranges strictly: a string is no number, `true` is no integer, an integer serves where a float
is wanted. Unknown keys are refused at every depth. All faults of a file are reported together, one line each, as

    optim.lr: input should be greater than 0; got -1.0
    data.sources[1].pth: unknown key, got "x.jsonl"; nearest: path; known keys: path, weight

A file may begin with `extends = "OTHER.toml"`, a path from its own folder: its tables then change single keys of that
file's; a list, such as [[data.sources]], takes the other's place whole. A fault names the file that holds its key.
Order of precedence: the dataclass's defaults, the file that is extended, the file, the overrides from left to right.
The environment is not read.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tomli_w

C = TypeVar("C")
Location = tuple[str | int, ...]
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names every fault by its dotted path."""


def load_config(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read the TOML file at path, apply overrides such as `optim.lr=1e-4`, and check the result as a cls.

    An override's value is read as TOML, and as a plain string where it is not TOML. ValueErrors of a dataclass's
    `__post_init__` (checks across fields) are reported under the dotted path of its table.
    Infinite numbers and NaN are refused everywhere: they would pass most ranges, and end in a loss that is NaN.
    Returns a cls.  Raises ConfigError with every fault found.
    """
    layers = _read_layers(path)
    table: dict[str, Any] = {}
    for _, layer in reversed(layers):
        table = _merged(table, layer)
    faults = [fault for override in overrides if (fault := _apply_override(table, override))]
    config = None
    try:
        # Only from JSON does pydantic's strict mode take tables for dataclasses, lists for tuples, strings for paths.
        # TOML dates become strings: no option of ours is a date, and `name = 2026-01-01` means the name.
        text = json.dumps(table, default=str)
        config = pydantic.TypeAdapter(cls).validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        faults += _validation_faults(cls, table, error)
    named = {fault.partition(": ")[0] for fault in faults}
    faults += [f"{dotted}: {cause}" for dotted, cause in _not_finite(table, ()) if dotted not in named]
    if faults or config is None:
        faults = [_with_origin(fault, layers) for fault in faults]
        raise ConfigError("\n  ".join([f"{path}: {len(faults)} fault{'s' * (len(faults) != 1)}", *faults]))
    return config


def write_config(config: Any, path: Path) -> None:
    """Write a config dataclass to path as TOML, whole or not at all, so that load_config reads an equal one back.

    TOML has no null: None is left out, which is only right where None is the default, so the file is read back first.
    Raises ConfigError that names the sections that would be read back as something else.
    """
    text = tomli_w.dumps(_to_toml(dataclasses.asdict(config)))
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    written, read = dataclasses.asdict(config), dataclasses.asdict(load_config(type(config), temporary))
    changed = [key for key in written if written[key] != read[key]]
    if changed:
        raise ConfigError(f"{path}: {', '.join(changed)} cannot be kept in TOML; a None must be its field's default")
    os.replace(temporary, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def existing(path: Path, dotted: str) -> Path:
    """Check that the file or folder named by a config key is there.

    dotted: the key's dotted path, for the message.
    Returns path.  Raises ConfigError that names the nearest entry of the folder, or the folder that is missing.
    """
    if path.exists():
        return path
    raise ConfigError(f"{dotted}: {_no_such_file(path)}")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Returns what json.loads gives.  Raises ValueError "FILE:LINE: not JSON (...)" where it is not UTF-8 text in JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise ValueError(
            f"{path}:{_json_fault(error)}; the file was cut off or damaged, copy or download it again"
        ) from error


def _json_fault(error: ValueError | RecursionError) -> str:
    """Return "LINE: not JSON (CAUSE)" of what json.loads or the decoding before it raised."""
    line, cause = 1, str(error)
    if isinstance(error, UnicodeDecodeError):
        line = error.object.count(b"\n", 0, error.start) + 1
        cause = f"byte {error.start} is {error.object[error.start]:#04x}, which is no UTF-8"
    elif isinstance(error, json.JSONDecodeError):
        line, cause = error.lineno, f"{error.msg} at column {error.colno}"
    return f"{line}: not JSON ({cause})"


def _no_such_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        missing = next((p for p in reversed(folder.parents) if not p.is_dir()), folder)
        return f"no such file or folder: {path}; {missing} is not a folder"
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=3, cutoff=0.5)
    return f"no such file or folder: {path}; nearest in that folder: {', '.join(near) or 'none'}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(_no_such_file(path)) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    except tomllib.TOMLDecodeError as error:
        lines = text.split("\n")
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}, the end of the document"
        raise ConfigError(f"{path}: not TOML: {str(error).replace('at end of document', end)}") from error


def _read_layers(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read a file, and after it those that it extends, with their paths."""
    layers: list[tuple[Path, dict[str, Any]]] = []
    while True:
        if path.resolve() in (read.resolve() for read, _ in layers):
            raise ConfigError(f"{layers[-1][0]}: extends leads back to {path}; a file cannot extend itself")
        table = _read_toml(path)
        named = table.pop("extends", None)
        layers.append((path, table))
        if named is None:
            return layers
        if not isinstance(named, str):
            raise ConfigError(f'{path}: extends must name one file, as in "e5_mistral_7b.toml"; got {_show(named)}')
        path = existing(path.parent / named, f"{path}: extends")


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _with_origin(fault: str, layers: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """Add to a fault the file that holds its key, where that is not the first."""
    keys = re.findall(r"[^.\[\]]+", fault.partition(": ")[0])
    for path, table in layers:
        value: Any = table
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else value
        if value is not None:
            return fault if path == layers[0][0] else f"{fault} (in {path})"
    return fault


def _apply_override(table: dict[str, Any], override: str) -> str | None:
    """Set one `a.b=value` in table. Returns the fault, if any."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(BARE_KEY.fullmatch(key) for key in keys):
        return f'override {_show(override)} is malformed; write section.key=value, as in "optim.lr=1e-4"'
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            outer = ".".join(keys[: depth + 1])
            return f"override {_show(override)} goes through {outer}, which is no table; got {_show(table)}"
    table[keys[-1]] = _toml_value(text.strip())
    return None


def _toml_value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break in text could smuggle in a second key.
    return parsed["value"] if len(parsed) == 1 else text


def _validation_faults(cls: type, table: Mapping[str, Any], error: pydantic.ValidationError) -> list[str]:
    """One line per dotted path; the branches of a union (`int | str`) fail one by one and are joined by "or"."""
    causes: dict[str, list[str]] = {}
    tails: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        location = _without_union_tags(table, detail["loc"], detail["type"] == "missing")
        dotted = _dotted(location)
        known = _known_keys(cls, location[:-1])
        cause, tail = detail["msg"][0].lower() + detail["msg"][1:], f"; got {_show(detail['input'])}"
        if detail["type"] == "unexpected_keyword_argument":
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
            cause = f"unknown key, got {_show(detail['input'])}"
            tail = f"; nearest: {', '.join(near) or 'none'}; known keys: {', '.join(known)}"
        elif detail["type"] == "missing":
            cause, tail = "missing, and has no default", f"; known keys: {', '.join(known)}" if known else ""
        elif detail["type"] in ("value_error", "assertion_error"):
            cause, tail = str(detail["ctx"]["error"]), ""
        causes.setdefault(dotted, []).append(cause)
        tails[dotted] = tail
    return [f"{dotted}: {' or '.join(dict.fromkeys(causes[dotted]))}{tails[dotted]}" for dotted in causes]


def _not_finite(value: object, location: Location) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, what is wrong) for every number that is infinite, NaN or beyond a float."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(item, (*location, key))
    elif isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # NaN compares false
        yield _dotted(location), f"must be a finite number; got {_show(value)}"


def _without_union_tags(table: Mapping[str, Any], location: Location, missing: bool) -> Location:
    """Drop the parts of a pydantic location that name a branch of a union, not a key or an index of the file."""
    kept: list[str | int] = []
    value: Any = table
    for i, part in enumerate(location):
        if isinstance(value, dict) and (part in value or (missing and i == len(location) - 1)):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        else:
            continue
        kept.append(part)
    return tuple(kept)


def _known_keys(cls: type, location: Location) -> list[str]:
    """The keys that the table at location may hold, sorted; empty where it is no dataclass."""
    candidates: list[Any] = [cls]
    for part in location:
        inner: list[Any] = []
        for candidate in candidates:
            if dataclasses.is_dataclass(candidate):
                inner += _alternatives(typing.get_type_hints(candidate, include_extras=True).get(str(part)))
            elif typing.get_origin(candidate) in (list, tuple, Sequence, dict, Mapping):
                inner += [leaf for argument in typing.get_args(candidate) for leaf in _alternatives(argument)]
        candidates = inner
    return sorted({field.name for c in candidates if dataclasses.is_dataclass(c) for field in dataclasses.fields(c)})


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation itself, without Annotated's extras."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [leaf for argument in typing.get_args(annotation) for leaf in _alternatives(argument)]
    return [annotation]


def _dotted(location: Location) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".") or "the file"


def _show(value: object, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[:limit] + "..."


def _to_toml(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_toml(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_to_toml(item) for item in value if item is not None]
    return str(value) if isinstance(value, Path) else value
