"""Reads frozen dataclasses of settings from flags, environment and a TOML file, in this order of precedence.

A settings class has groups (dataclasses) and lone fields, all made by `setting`. Group `transfer`, field `mode` is:

* flag `--transfer-mode VALUE`
* environment `SPOTGUARD_TRANSFER__MODE=VALUE`. Two underscores, because Kubernetes puts variables of the form
  SPOTGUARD_CONTROL_PORT=tcp://... into every pod of a namespace that has a service of that name.
* file: `mode = VALUE` below `[transfer]`; the file is named by `--config` or SPOTGUARD_CONFIG.
"""

import argparse
import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotguard.errors import ConfigError

ENV_PREFIX = "SPOTGUARD_"
CONFIG_VARIABLE = "SPOTGUARD_CONFIG"
_REQUIRED = object()


@dataclass(frozen=True)
class Kind[T]:
    """How a value is read.

    `convert` takes text or TOML's own types and raises ValueError or TypeError; `expected` says what it wants; `show`
    writes a value the way a person would type it.
    """

    expected: str
    convert: Callable[[object], T]
    show: Callable[[T], str] = str


@dataclass(frozen=True)
class Field:
    """One setting, found in a settings class. `path`: (group, field) or (field,)."""

    path: tuple[str, ...]
    kind: Kind[Any]
    meaning: str
    unit: str
    default: object

    @property
    def name(self) -> str:
        """Name it as messages and the manual do."""
        return ".".join(self.path)

    @property
    def flag(self) -> str:
        """Name its flag."""
        return "--" + "-".join(self.path).replace("_", "-")

    @property
    def variable(self) -> str:
        """Name its environment variable."""
        return ENV_PREFIX + "__".join(self.path).upper()

    @property
    def required(self) -> bool:
        """Tell whether it has no default."""
        return self.default is _REQUIRED


def setting(kind: Kind[Any], meaning: str, *, default: object = _REQUIRED, unit: str = "") -> Any:
    """Declare a field of a settings class (which must be `kw_only`): what it means, in which unit, and its default.

    Without a default it must be set.
    """
    about = {"kind": kind, "meaning": meaning, "unit": unit, "default": default}
    if default is _REQUIRED:
        return dataclasses.field(metadata=about)
    return dataclasses.field(default=default, metadata=about)


def fields_of(cls: type[Any]) -> Iterator[Field]:
    """Yield every setting of a settings class, in the order of their declaration."""
    for part, group in _parts(cls):
        for member in dataclasses.fields(group) if group else (part,):
            about = member.metadata
            path = (part.name, member.name) if group else (member.name,)
            yield Field(path, about["kind"], about["meaning"], about["unit"], about["default"])


def add_arguments(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Give `parser` one flag per setting of `cls`, and `--config`; `load` reads what was parsed."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file of settings (or SPOTGUARD_CONFIG)")
    for field in fields_of(cls):
        unit = f" [{field.unit}]" if field.unit else ""
        help_text = f"{field.meaning}{unit}; {_default_text(field)}".replace("%", "%%")
        # Texts only: load() converts, so that a wrong flag is told together with all other mistakes.
        parser.add_argument(field.flag, dest=field.name, metavar="VALUE", help=help_text)


def load[T](cls: type[T], args: argparse.Namespace, env: Mapping[str, str]) -> T:
    """Build `cls` from parsed flags, environment and file; flags win over environment over file over default.

    `cls` may have a method `problems() -> list[str]` for what concerns several fields. Raises ConfigError with every
    mistake at once, each naming the setting, where it was set, the value and what is expected.
    """
    fields = list(fields_of(cls))
    problems: list[str] = []
    path = args.config or (Path(env[CONFIG_VARIABLE]) if env.get(CONFIG_VARIABLE) else None)
    layers = [_from_flags(args, fields), _from_env(env, fields, problems), _from_file(path, cls, problems)]
    values: dict[tuple[str, ...], object] = {}
    for field in fields:
        found = next((layer[field.name] for layer in layers if field.name in layer), None)
        try:
            values[field.path] = _value(field, found)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems, remedy="every setting is described in docs/settings.md")
    settings = _build(cls, values)
    problems = getattr(settings, "problems", list)()
    if problems:
        raise ConfigError(problems)
    return settings


def describe(cls: type[Any], title: str) -> str:
    """Write the reference of a settings class as Markdown."""
    lines = [f"## {title}", ""]
    group = None
    for field in fields_of(cls):
        if field.path[:-1] != group:
            group = field.path[:-1]
            lines += [f"### `[{group[0]}]`" if group else "### Without a group", ""]
            lines += ["| setting | default | unit | expected | meaning |", "|---|---|---|---|---|"]
        default = "required" if field.required else f"`{_shown(field)}`" if _shown(field) else "none"
        cells = [f"`{field.path[-1]}`", default, field.unit, field.kind.expected, field.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if field.path == [f.path for f in fields_of(cls) if f.path[:-1] == group][-1]:
            lines.append("")
    return "\n".join(lines)


def _parts(cls: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], type[Any] | None]]:
    """Yield each field of a settings class and, if it is a group, the group's class."""
    hints = typing.get_type_hints(cls)
    for part in dataclasses.fields(cls):
        hint = hints[part.name]
        yield part, hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) and not part.metadata else None


def _build[T](cls: type[T], values: Mapping[tuple[str, ...], object]) -> T:
    parts: dict[str, object] = {}
    for part, group in _parts(cls):
        if group:
            parts[part.name] = group(**{f.name: values[part.name, f.name] for f in dataclasses.fields(group)})
        else:
            parts[part.name] = values[(part.name,)]
    return cls(**parts)


def _value(field: Field, found: tuple[object, str] | None) -> object:
    if found is None:
        if field.required:
            raise ValueError(
                f"{field.name} is not set; expected {field.kind.expected} "
                f"(by {field.flag}, {field.variable} or the configuration file)"
            )
        return field.default
    raw, origin = found
    try:
        return field.kind.convert(raw)
    except (ValueError, TypeError) as error:
        detail = f" ({error})" if str(error) else ""
        raise ValueError(
            f"{field.name} (set by {origin}) is {raw!r}; expected {field.kind.expected}{detail}"
        ) from error


def _from_flags(args: argparse.Namespace, fields: list[Field]) -> dict[str, tuple[object, str]]:
    given = vars(args)
    return {f.name: (given[f.name], f.flag) for f in fields if given.get(f.name) is not None}


def _from_env(env: Mapping[str, str], fields: list[Field], problems: list[str]) -> dict[str, tuple[object, str]]:
    known = {field.variable: field for field in fields}
    # Without "__" a variable may be anybody's: Kubernetes' service links, or this project's own scripts.
    strangers = [name for name in env if name.startswith(ENV_PREFIX) and "__" in name and name not in known]
    problems += [f"{name} (environment) is no setting{_did_you_mean(name, known)}" for name in sorted(strangers)]
    return {field.name: (env[variable], variable) for variable, field in known.items() if variable in env}


def _from_file(path: Path | None, cls: type[Any], problems: list[str]) -> dict[str, tuple[object, str]]:
    if path is None:
        return {}
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # TOML and Unicode errors are ValueErrors
        problems.append(f"the configuration file {path} cannot be read: {error}")
        return {}
    found: dict[str, tuple[object, str]] = {}
    parts = {part.name: group for part, group in _parts(cls)}
    for key, value in content.items():
        group = parts.get(key)
        if key not in parts:
            problems.append(f"{key} (in {path}) is no setting{_did_you_mean(key, parts)}")
        elif group is None:
            found[key] = (value, str(path))
        elif not isinstance(value, dict):
            problems.append(f"{key} (in {path}) is {value!r}; expected a table [{key}]")
        else:
            problems += _read_group(key, group, value, found, str(path))
    return found


def _read_group(
    name: str, group: type[Any], table: Mapping[str, object], found: dict[str, tuple[object, str]], origin: str
) -> list[str]:
    known = [field.name for field in dataclasses.fields(group)]
    strangers = [key for key in table if key not in known]
    found.update({f"{name}.{key}": (value, origin) for key, value in table.items() if key in known})
    return [f"{name}.{k} (in {origin}) is no setting{_did_you_mean(k, known, name + '.')}" for k in strangers]


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _shown(field: Field) -> str:
    return "" if field.default is None else field.kind.show(field.default)


def _default_text(field: Field) -> str:
    return "required" if field.required else f"default {_shown(field) or 'none'}"
