"""How long a user waits for compiled steps: LLQR beside SOAP, Muon and AdamW, in one process.

    uv run python -m benchmarks.compile                     # figures: results/compile.json
    uv run python -m benchmarks.compile unet --repeats 5
    uv run python -m benchmarks.compile --quick             # the MLP alone, once

A whole step: gradient, update, and the new parameters. A method whose steps are of two kinds, with
a refit (or new bases) and without, is given by the seconds of both together; "by itself" is one
step that decides inside, as `update` without `refresh` does. Tracing and lowering
are JAX's, compilation XLA's; nothing is run, and no cache is asked. Repeats take turns over
methods, and ratios are of medians.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import optax

import llqr
from benchmarks.models import MODELS, Model
from benchmarks.reporting import ask, environment, show, write
from benchmarks.suite.methods.soap import scale_by_soap

NAMES = ("mlp", "transformer", "scanned", "unet", "resnet18")
RATE = 1e-3

Kinds = dict[str, Callable[..., tuple[Any, Any]]]
"""Kind -> (gradient, state, parameters, batch) -> updates and state."""


def methods(model: Model) -> dict[str, tuple[optax.GradientTransformation, Kinds]]:
    """Return what is compiled, by name."""
    soap = optax.chain(scale_by_soap(), optax.scale(-RATE))
    streaming = llqr.streaming(RATE, metric=model.metric)
    gradients = llqr.streaming(RATE, refit=llqr.Streaming(probe="gradient"))

    def plain(tx: optax.GradientTransformation) -> Kinds:
        return {"step": lambda g, s, p, b: tx.update(g, s, p)}

    def both(tx: Any, bound: bool) -> Kinds:
        def refit(g: Any, s: Any, p: Any, b: Any) -> tuple[Any, Any]:
            more = {"objective": model.objective.bind(b)} if bound else {}
            return tx.update(g, s, p, refresh=True, **more)

        return {"step": lambda g, s, p, b: tx.update(g, s, p, refresh=False), "refit": refit}

    def alone(tx: Any, bound: bool) -> Kinds:
        def step(g: Any, s: Any, p: Any, b: Any) -> tuple[Any, Any]:
            return tx.update(g, s, p, **({"objective": model.objective.bind(b)} if bound else {}))

        return {"by itself": step}

    adamw, muon = optax.adamw(RATE), optax.contrib.muon(RATE)
    return {
        "AdamW": (adamw, plain(adamw)),
        "Muon": (muon, plain(muon)),
        "SOAP": (soap, both(soap, False)),
        "LLQR streaming": (streaming, both(streaming, True)),
        "LLQR gradients": (gradients, both(gradients, False)),
        "LLQR streaming, one step": (streaming, alone(streaming, True)),
        "LLQR gradients, one step": (gradients, alone(gradients, False)),
    }


def seconds(model: Model, tx: Any, update: Callable[..., Any]) -> dict[str, float]:
    """Return the seconds of tracing, lowering and compiling a step of a kind."""

    def step(params: Any, state: Any, batch: Any) -> Any:  # its own: JAX knows no other of the kind
        gradient = jax.grad(model.objective)(params, batch)
        updates, state = update(gradient, state, params, batch)
        return optax.apply_updates(params, updates), state

    params = jax.eval_shape(model.init)
    state = jax.eval_shape(tx.init, params)
    batch = jax.eval_shape(lambda: model.data(jax.random.key(0), model.batch))
    jax.clear_caches()
    clock = [time.perf_counter()]
    traced = jax.jit(step).trace(params, state, batch)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    spans = (later - earlier for earlier, later in pairwise(clock))
    return dict(zip(("trace", "lower", "compile"), spans, strict=True))


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each method."""
    model = MODELS[name]
    known = methods(model)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for who, (tx, kinds) in known.items():
            for kind, update in kinds.items():
                found.setdefault((who, kind), []).append(seconds(model, tx, update))
    totals = {
        who: sum(statistics.median(sum(x.values()) for x in found[who, kind]) for kind in kinds)
        for who, (_, kinds) in known.items()
    }
    rows = []
    for (who, kind), times in found.items():
        parts = {part: statistics.median(t[part] for t in times) for part in times[0]}
        rows.append(
            {"model": model.name, "method": who, "kind": kind}
            | {f"{part} (s)": round(value, 2) for part, value in parts.items()}
            | {
                "all kinds (s)": round(totals[who], 2),
                "/ SOAP": round(totals[who] / totals["SOAP"], 2),
                "/ AdamW": round(totals[who] / totals["AdamW"], 2),
            }
        )
    return rows


def main() -> None:
    """Measure, show and write."""
    jax.config.update("jax_enable_compilation_cache", False)
    names, repeats, quick = ask(__doc__ or "", NAMES, repeats=3, quick="the MLP alone, once")
    seconds(MODELS["mlp"], *_first(methods(MODELS["mlp"])["AdamW"]))  # what JAX does once
    rows = [row for name in (("mlp",) if quick else names) for row in measure(name, repeats)]
    show("seconds until a step is compiled", rows)
    if not quick and tuple(names) == NAMES:
        write("compile", environment(repeats=repeats), rows)


def _first(method: tuple[Any, Kinds]) -> tuple[Any, Callable[..., Any]]:
    tx, kinds = method
    return tx, next(iter(kinds.values()))


if __name__ == "__main__":
    main()
