"""What an option is: one row of the table, with its meaning, its legal values and what it becomes.

A row names the field that it becomes, such as `refit.steps`, and how where that is not as it is:

  by       the group of its schedule: the field is a schedule around the option's value
  off      a value that means None
  instead  the option whose value counts where this one is null
  convert  a function, or a mapping, of the value

Two options that become the same field give it the smaller of their values.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, TypeVar

from llqr._errors import unknown
from llqr_experiments.errors import ConfigError

T = TypeVar("T")

BOUNDS = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
"""Rules of numbers, and their signs."""


def option(default: T, meaning: str, *, becomes: str | tuple[str, ...] = (), **rules: Any) -> T:
    """Declare an option.

    Args:
      default: its value where none is given.
      meaning: in words, for help and docs/options.md.
      becomes: the fields it becomes, "<owner>.<field>".
      **rules: choices, low, high, above, below of its value; by, off, instead, convert of what
        it becomes.
    """
    paths = (becomes,) if isinstance(becomes, str) else becomes
    metadata = {"meaning": meaning, "becomes": paths, **rules}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield (full name, dataclass field, value) of every leaf option, or of a config class."""
    for row in fields(config):
        value = getattr(config, row.name, None)
        nested = row.default_factory if isinstance(config, type) else value
        if is_dataclass(nested):
            yield from options(nested, f"{row.name}.")
        else:
            yield prefix + row.name, row, value


def become(
    config: Any, owner: str, schedule: Callable[[str, Any], Any] = lambda _, value: value
) -> dict[str, Any]:
    """Return what options become: field -> value, for the fields of one owner.

    Args:
      config: a config, or a group of one.
      owner: the first half of what options become, such as "refit".
      schedule: (group, value) -> the schedule of that group around the value.
    """
    found: dict[str, Any] = {}
    for _, row, value in options(config):
        for path in row.metadata.get("becomes", ()):
            of, _, name = path.partition(".")
            if of != owner:
                continue
            value = _converted(config, row.metadata, value)
            if "by" in row.metadata:
                value = schedule(row.metadata["by"], value)
            known = [x for x in (found.get(name), value) if x is not None]
            found[name] = min(known) if len(known) > 1 else next(iter(known), None)
    return found


def _converted(config: Any, rules: Mapping[str, Any], value: Any) -> Any:
    if value is None and "instead" in rules:
        value = getattr(config, rules["instead"])
    if "off" in rules and value == rules["off"]:
        value = None
    convert = rules.get("convert")
    if isinstance(convert, Mapping):
        return convert[value]
    return convert(value) if convert else value


def accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that a function has."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in known}


def default(row: Field[Any]) -> str:
    """Return an option's default as it is written on the command line."""
    value = plain(row)
    spelling = {"None": "null", "True": "true", "False": "false"}
    return spelling.get(str(value), str(value))


def plain(row: Field[Any]) -> Any:
    """Return an option's default."""
    return row.default if row.default_factory is MISSING else row.default_factory()


def legal(row: Field[Any]) -> str:
    """Return the legal values of an option in words."""
    rules = row.metadata
    if "choices" in rules:
        return ", ".join(f"`{choice}`" for choice in rules["choices"])
    return ", ".join(f"{sign} {rules[rule]:g}" for rule, sign in BOUNDS.items() if rule in rules)


def check(name: str, rules: Mapping[str, Any], value: Any) -> None:
    """Raise ConfigError if a value is not legal; null always is.

    Args:
      name: of the option.
      rules: choices, low, high, above, below.
      value: to check.
    """
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise ConfigError(f"{name}: {unknown('value', value, rules['choices'])}")
    holds = {
        "low": lambda bound: value >= bound,
        "high": lambda bound: value <= bound,
        "above": lambda bound: value > bound,
        "below": lambda bound: value < bound,
    }
    known = [rule for rule in holds if rule in rules]
    if not all(holds[rule](rules[rule]) for rule in known):
        bounds = " and ".join(f"{BOUNDS[rule]} {rules[rule]}" for rule in known)
        raise ConfigError(f"{name}={value}: must be {bounds}.")
