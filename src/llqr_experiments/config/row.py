"""What an option is: one row of the table, with its meaning, its legal values and what it becomes.

A row names the field that it becomes, such as `refit.steps`, and how where that is not as it is:

  by       the group of its schedule: the field is a schedule around the option's value
  off      a value that means None
  instead  the option whose value counts where this one is null
  convert  a function, or a mapping, of the value

Two options that become the same field give it the smaller of their values.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from llqr_experiments.errors import ConfigError, unknown

T = TypeVar("T")

BOUNDS = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
"""Rules of numbers, and their signs."""


def option(default: T, meaning: str, *, becomes: str | tuple[str, ...] = (), **rules: Any) -> T:
    """Declare an option.

    Args:
      default: its value where none is given.
      meaning: in words, for help and docs/options.md.
      becomes: the fields it becomes, "<owner>.<field>".
      **rules: choices (and what they are called), low, high, above, below of its value; shortest,
        length, rising of a list, and `of`, the rules of what is in it; path: `~` is the home
        folder in it; by, off, instead, convert of what it becomes.
    """
    paths = (becomes,) if isinstance(becomes, str) else becomes
    metadata = {"meaning": meaning, "becomes": paths, **rules}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def rows(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield (full name, dataclass field, value) of every leaf option, or of a config class."""
    for row in fields(config):
        value = getattr(config, row.name, None)
        nested = row.default_factory if isinstance(config, type) else value
        if is_dataclass(nested):
            yield from rows(nested, f"{row.name}.")
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
    for _, row, value in rows(config):
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
    return spelt(plain(row))


def plain(row: Field[Any]) -> Any:
    """Return an option's default."""
    return row.default if row.default_factory is MISSING else row.default_factory()


def legal(row: Field[Any]) -> str:
    """Return the legal values of an option in words."""
    rules = row.metadata
    if "choices" in rules:
        return ", ".join(f"`{choice}`" for choice in rules["choices"])
    kind, optional = kinds(row)
    words = _words(kind, rules)
    return words + (", or null" if optional else "")


def _words(kind: Any, rules: Mapping[str, Any]) -> str:
    """A type and the rules of its values, in words."""
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        length = f" of {rules['length']}" if "length" in rules else ""
        order = ", rising" if rules.get("rising") else ""
        some = ", not empty" if rules.get("shortest") else ""
        return f"a list{length}{some}: {_words(inner, rules.get('of', {}))}{order}"
    if "choices" in rules:
        return f"one of {', '.join(rules['choices'])}"
    return f"{KINDS.get(kind, 'a value')} {_bounds(rules)}".strip()


def _bounds(rules: Mapping[str, Any]) -> str:
    return " and ".join(
        f"{sign} {rules[rule]:.10g}" for rule, sign in BOUNDS.items() if rule in rules
    )


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

LARGEST = 3.4e38
"""No number is larger: what devices compute in has no more."""

MOST = 2**31 - 1
"""The largest whole number, where no rule says less: what devices count in."""


def kinds(row: Field[Any]) -> tuple[Any, bool]:
    """Return the type of an option, and whether null is one of its values."""
    if get_origin(row.type) is UnionType:
        found = [kind for kind in get_args(row.type) if kind is not NoneType]
        return found[0], True
    return row.type, False


def check(name: str, row: Field[Any], value: Any) -> None:
    """Raise ConfigError if a value is not legal: of another type, out of range, not finite.

    Args:
      name: of the option.
      row: of the table.
      value: to check.
    """
    rules = row.metadata
    kind, optional = kinds(row)
    if value is None and optional:
        return
    if "choices" in rules:
        if value not in rules["choices"]:
            kind = rules.get("called", "value")
            raise ConfigError(f"{name}: {unknown(kind, value, rules['choices'])}")
        return
    choices = rules.get("of", {}).get("choices")
    for inner in value if choices and isinstance(value, list) else ():
        if inner not in choices:
            raise ConfigError(f"{name}: {unknown('value', inner, choices)}")
    if not _is_legal(kind, rules, value):
        typed = isinstance(value, int | float) and _is_legal(kind, {"high": math.inf}, value)
        words = _bounds({"high": MOST, **rules} if kind is int else rules) if typed else ""
        raise ConfigError(f"{name}={spelt(value)}: must be {words or legal(row)}.")


def _is_legal(kind: Any, rules: Mapping[str, Any], value: Any) -> bool:
    if get_origin(kind) is list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        if len(value) != rules.get("length", len(value)) or len(value) < rules.get("shortest", 0):
            return False
        (inner,) = get_args(kind)
        if not all(_is_legal(inner, rules.get("of", {}), x) for x in value):
            return False
        return not rules.get("rising") or all(a < b for a, b in pairwise(value))
    if kind in (int, float):
        numbers = int if kind is int else int | float
        if isinstance(value, bool) or not isinstance(value, numbers):
            return False
        if kind is float and not abs(value) < LARGEST:  # not a number, infinite, too large
            return False
        rules = {"high": MOST, **rules} if kind is int else rules
        return all(holds(value, rules[rule]) for rule, holds in HOLDS.items() if rule in rules)
    if "choices" in rules:
        return value in rules["choices"]
    return not isinstance(kind, type) or isinstance(value, kind)


HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "low": operator.ge, "above": operator.gt, "high": operator.le, "below": operator.lt,
}  # fmt: skip


def spelt(value: Any) -> str:
    """Return a value as it is written on the command line."""
    spelling = {None: "null", True: "true", False: "false"}
    known = value is None or isinstance(value, bool)
    return spelling[value] if known else str(value)
