"""What does an update pass through? Files and functions of the library, while it is traced.

    uv run python tools/passage.py            # counts
    uv run python tools/passage.py --list     # and every function, by file

A streaming update of three leaves, without a refit and with one; and a published update.
"""

import argparse
import sys
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import llqr

HERE = str(Path(llqr.__file__).parent)


class Passage:
    """Functions of the library that are entered, in order."""

    def __init__(self) -> None:
        self.entered: list[tuple[str, str, int]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note a function of the library that is entered: what `sys.setprofile` calls."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(HERE):
            file = code.co_filename.removeprefix(HERE + "/")
            self.entered.append((file, code.co_qualname, code.co_firstlineno))

    def follow(self, function: Any, *arguments: Any) -> None:
        """Trace a function once."""
        # A new function: JAX does not trace one that it knows.
        traced = jax.make_jaxpr(lambda *xs: function(*xs))
        sys.setprofile(self)
        try:
            traced(*arguments)
        finally:
            sys.setprofile(None)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Files, functions, and how often the one that is entered lies in another file."""
        files = [file for file, _, _ in self.entered]
        changes = sum(a != b for a, b in pairwise(files))
        return len(set(files)), len(set(self.entered)), changes


def problem() -> tuple[Any, Any]:
    """Return three leaves, and an objective on them."""
    params = {"a": {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)}, "b": jnp.ones((4, 3))}

    def forward(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]

    objective = llqr.Objective(forward, lambda z, x: -jax.nn.log_softmax(z)[:, 0].mean())
    return params, objective.bind(jnp.ones((8, 5)))


def main() -> None:
    """Trace the updates, and print what they pass through."""
    parser = argparse.ArgumentParser(description="What does an update pass through?")
    parser.add_argument("--list", action="store_true", help="every function, by file")
    listed = parser.parse_args().list
    params, bound = problem()
    published = llqr.llqr(optax.sgd(0.1), structure="e-kfac")
    for name, tx, due in (
        ("streaming, plain", llqr.streaming(1e-3), False),
        ("streaming, with a refit", llqr.streaming(1e-3), True),
        ("published, plain", published, False),
        ("published, with a refit", published, True),
    ):
        state = tx.init(params)
        update = partial(tx.update, objective=bound if due else None, refresh=due)
        passage = Passage()
        passage.follow(lambda g, s, p, u=update: u(g, s, p), params, state, params)
        files, functions, changes = passage.counts
        print(f"{name}: {files} files, {functions} functions, {changes} changes of file")
        if listed:
            for (file, function, _), times in sorted(Counter(passage.entered).items()):
                print(f"    {file:32} {function:50} {times}")


if __name__ == "__main__":
    main()
