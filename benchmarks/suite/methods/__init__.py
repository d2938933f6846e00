"""What trains, by name. `method` says what a method is; to add one, add it to a tuple."""

import importlib.util

from benchmarks.suite.workloads.problem import Workload

from . import first_order, ours, peers
from .method import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (*first_order.METHODS, *peers.METHODS, *ours.METHODS)
}


def is_installed(method: Method) -> bool:
    """Whether its package is here."""
    return not method.package or importlib.util.find_spec(method.package) is not None


def choose(asked: str) -> list[Method]:
    """Return the methods of names between commas; all of them for an empty string.

    Raises:
      ValueError: a name is of none.

    Example:
      >>> [method.name for method in choose("AdamW,SOAP")]
      ['AdamW', 'SOAP']
    """
    names = [name.strip() for name in asked.split(",")] if asked else list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"unknown methods {unknown}: choose from {', '.join(METHODS)}.")
    return [METHODS[name] for name in names]


def suited(methods: list[Method], workload: Workload) -> list[Method]:
    """Return those that are installed and apply to a workload."""
    return [m for m in methods if is_installed(m) and m.applies(workload)]
