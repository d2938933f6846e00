"""What SAM costs: perturbed / plain step, in one process.

    uv run python benchmarks/sam_cost.py
    uv run python benchmarks/sam_cost.py cnn --repeats 9
    uv run python benchmarks/sam_cost.py --quick            # a smoke test

Each repeat times the plain step before and after the perturbed one; the ratio is to the
mean of the two. Every step includes the update of SGD, with P where the name says so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from models import MODELS, Model
from refit_cost import seconds, stepper
from reporting import ask, environment, show, spread, write
from rich.progress import track

import llqr

METHODS: dict[str, tuple[llqr.Sharpness, bool]] = {
    "base_sam": (llqr.sam(0.1), False),
    "base_sam, matrix_norm, P": (
        llqr.sam(0.1, direction="ema_precond_grad", norm="matrix_norm"),
        True,
    ),
    "base_fsam": (llqr.friendly_sam(0.1), False),
    "past_fsam": (llqr.past_friendly_sam(0.1), False),
    "asam": (llqr.asam(0.1), False),
    "fisher_sam": (llqr.fisher_sam(0.1), False),
}
"""Name -> (perturbation, whether P is used in it and in the update)."""


def perturbed(model: Model, method: llqr.Sharpness, tx: Any, with_p: bool) -> Callable[[], Any]:
    """A SAM step on fixed inputs, compiled."""
    oracle, params = method(model.objective), model.init()
    batch = model.data(jax.random.key(1), model.batch)

    @jax.jit
    def step(params: Any, state: Any, sharpness: Any, batch: Any) -> Any:
        product = partial(llqr.precondition, tx, state) if with_p else None
        value, grads, sharpness = oracle.step(params, sharpness, batch, precondition=product)
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), state, sharpness, value

    state, sharpness = tx.init(params), oracle.init(params)
    act = lambda: step(params, state, sharpness, batch)  # noqa: E731
    jax.block_until_ready(act())
    return act


def measure(model: Model, name: str, repeats: int) -> dict[str, Any]:
    """Time one method on one model."""
    jax.clear_caches()
    method, with_p = METHODS[name]
    base = optax.with_extra_args_support(optax.sgd(0.1))
    tx = llqr.llqr(base, structure="diagonal") if with_p else base
    params, batch = model.init(), model.data(jax.random.key(1), model.batch)
    plain = stepper(model.objective, base, params, batch)
    sam = perturbed(model, method, tx, with_p)
    ratios, times = [], []
    for _ in range(repeats):
        before = seconds(plain, model.steps)
        other = seconds(sam, model.steps)
        step = (before + seconds(plain, model.steps)) / 2
        ratios.append(other / step)
        times.append(1e3 * step)
    return {
        "model": model.name,
        "method": name,
        "gradients": method.passes,
        "plain step (ms)": spread(times),
        "perturbed / plain step": spread(ratios),
    }


def main() -> None:
    """Measure, print a table, write JSON with the environment."""
    names = ["mlp", "cnn", "transformer"]
    models, repeats, quick = ask(
        "What SAM costs.", names, repeats=7, quick="one repeat of one method"
    )
    jobs = [(model, method) for model in models for method in METHODS]
    if quick:
        jobs = [("mlp", "base_sam")]
    rows = [measure(MODELS[m], name, repeats) for m, name in track(jobs, "measuring")]
    where = environment(repeats=repeats)
    show(f"SAM, {where['device']}, {where['cores']} cores", rows)
    write("sam_cost_quick" if quick else "sam_cost", where, rows)


if __name__ == "__main__":
    main()
