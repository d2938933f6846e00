"""Every route gives the numbers of the default: products, and whole refits."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llqr
from llqr import lqr
from llqr.curvature.route import Route
from tests import cases, oracle, staged
from tests.cases import Case

ROUTES = {
    "curvature_recomputed": Route(memory="curvature_recomputed"),
    "recomputed": Route(memory="recomputed"),
    "rematerialized": Route(memory="recomputed", checkpoint_policy="dots_no_batch_dims"),
    "chunks of 2": Route(chunk_size=2),
    "chunks of 4": Route(chunk_size=4),
    "chunks of 5": Route(chunk_size=5),
    "one chunk": Route(chunk_size=100),
}


def bound(case: Case) -> llqr.BoundObjective:
    """The objective, with what its examples share marked as such."""
    if case is cases.CNN:
        axes = lambda batch: {"x": 0, "y": 0, "stats": None}  # noqa: E731
        return replace(case.objective, batch_axes=axes).bind(case.batch)
    return case.bound


@jax.jit
def numbers(model: llqr.QuadraticModel, u: Any) -> Any:
    value, slope = oracle.value_and_gradient(model, u)
    return {"loss": model.loss, "J": value, "slope": slope, "inner": model.bilinear(u, u)}


CHOSEN = [
    # every route and reduction on two small ones, the two far ends on the others
    *((cases.MLP_TANH, name, red, ROUTES) for name, red in (("ngd", "unit"), ("newton", "sum"))),
    *(
        (case, name, "mean", ("recomputed", "chunks of 4"))
        for case, name in (
            (cases.MLP_TANH, "renyi_2"),
            (cases.MLP_MASKED, "gauss_newton"),
            (cases.MLP_MASKED, "ngd"),
            (cases.MLP_MASKED, "newton"),
            (cases.CNN, "renyi(2)"),
            (cases.CNN, "newton"),
            (cases.ATTENTION, "ngd"),
            (cases.TWO_HEADS, {"class": "ngd", "value": "gaussian"}),
            (cases.TWO_HEADS, "newton"),
        )
    ),
]


@pytest.mark.parametrize(("case", "name", "reduction", "routes"), CHOSEN, ids=cases.label)
def test_routes_agree(case: Case, name: Any, reduction: Any, routes: Any) -> None:
    u = case.control(3)

    @partial(jax.jit, static_argnames="route")
    def traced(route: Route | None) -> Any:
        model = llqr.linearize(
            bound(case), case.params, cases.metric(name), damping=0.3,
            divergence_reduction=reduction, route=route,
        )  # fmt: skip
        return numbers(model, u)

    with jax.numpy_dtype_promotion("standard"):
        expected = oracle.flat(traced(None))
        for route in routes:
            oracle.close(oracle.flat(traced(ROUTES[route])), expected, np.abs(expected).max())


@pytest.mark.parametrize("name", ["ngd", "newton"])
def test_chunks_agree_outside_a_trace(name: str) -> None:
    """There the chunks are looped over in Python."""
    case, u = cases.MLP_MASKED, cases.MLP_MASKED.control(3)
    build = partial(llqr.linearize, case.bound, case.params, name, damping=0.3)
    chunked = build(route=Route(chunk_size=4))
    model = jax.jit(lambda: build(route=None))()
    value, slope = oracle.value_and_gradient(model, u)
    found, other = oracle.value_and_gradient(chunked, u)
    oracle.close(found, value)
    oracle.close(oracle.flat(other), oracle.flat(slope))
    oracle.close(chunked.bilinear(u, case.control(4)), model.bilinear(u, case.control(4)))


def _half(outputs: str) -> llqr.Objective:
    def forward(params: Any, x: Any) -> Any:
        return (x.astype(params.dtype) @ params).astype(outputs)

    return llqr.Objective(forward, lambda z, _: jnp.sum(z.astype(jnp.float32)))


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("params", "outputs"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")],
)
def test_chunks_of_half_precision(params: str, outputs: str, reduction: Any, traced: bool) -> None:
    """Sums over many chunks go on growing, and nothing is promoted unasked."""
    rows = 1200
    objective = _half(outputs).bind(jnp.ones((rows, 3), jnp.float32))
    theta, u = jnp.full((3, 1), 0.25, params), jnp.full((3, 1), 0.5, params)

    def inner(theta: Any, u: Any) -> Any:
        route, metric = Route(chunk_size=1 if traced else 10), "gaussian"
        model = llqr.linearize(
            objective, theta, metric, divergence_reduction=reduction, route=route
        )
        return model.bilinear(u, u), model.product(u)

    value, product = (jax.jit(inner) if traced else inner)(theta, u)
    count = 1 if reduction == "mean" else rows
    np.testing.assert_allclose(float(value), 2.25 * count, rtol=1e-2)
    assert product.dtype == params
    assert np.isfinite(np.asarray(product, np.float32)).all()


@pytest.mark.parametrize("memory", ["cached", "curvature_recomputed", "recomputed"])
@pytest.mark.parametrize("metric", ["ngd", "newton"])
@pytest.mark.parametrize(
    "case", [c for c in staged.STAGED if c.name in ("passive", "masked")], ids=lambda c: c.name
)
def test_layerwise_equals_fused(case: staged.Staged, metric: str, memory: Any) -> None:
    params, inputs, loss = case.build()
    objective, batch = staged_objective(case, inputs, loss)
    rng = np.random.default_rng(0)
    u = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)

    @partial(jax.jit, static_argnames="route")
    def found(route: Route) -> Any:
        model = llqr.linearize(objective.bind(batch), params, metric, damping=0.2, route=route)
        return numbers(model, u), model.jacobian.vjp(jax.tree.map(jnp.cos, model.outputs))

    layerwise = found(Route(layerwise=True, memory=memory))
    oracle.close(oracle.flat(layerwise), oracle.flat(found(Route())))


def staged_objective(case: staged.Staged, inputs: Any, loss: Any) -> tuple[llqr.Objective, Any]:
    mask = None if case.rows is None else lambda batch: case.rows
    forward = case.model.as_forward()
    return llqr.Objective(forward, lambda z, batch: loss(z), mask), inputs


def test_a_rematerialized_staged_model_is_cut_at_its_segments() -> None:
    case = staged.STAGED[0]
    params, inputs, loss = case.build()
    objective, batch = staged_objective(case, inputs, loss)
    route = Route(memory="recomputed", checkpoint_policy="dots_no_batch_dims")
    model = llqr.linearize(objective.bind(batch), params, route=route)
    text = str(jax.make_jaxpr(lambda u: model.jacobian.vjp(model.jacobian.jvp(u)))(params))
    assert text.count("checkpoint") + text.count("remat") >= len(case.model.segments)
    for chosen in (route, replace(route, layerwise=True)):
        other = llqr.linearize(objective.bind(batch), params, route=chosen)
        plain = llqr.linearize(objective.bind(batch), params)
        u = jax.tree.map(jnp.cos, params)
        oracle.close(oracle.flat(other.product(u)), oracle.flat(plain.product(u)))


# --- whole refits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["ngd", "newton", "renyi(2)"])
def test_refits_agree(name: str, normalize: bool) -> None:
    case = cases.MLP_MASKED
    refit = llqr.Refit(steps=3, learning_rate=1e-3, normalize_gradient=normalize)

    def run(route: Route | None, traced: bool = False) -> np.ndarray:
        tx = llqr.scale_by_llqr(
            structure="kfac", metric=cases.metric(name), damping=0.5, route=route, refit=refit
        )
        again = lambda state: llqr.refresh(tx, state, case.params, case.bound)  # noqa: E731
        state = (jax.jit(again) if traced else again)(tx.init(case.params))
        assert int(state.refit.guarded) == 0
        return oracle.flat(state)

    expected = run(None)
    for route in ("recomputed", "chunks of 4"):
        oracle.close(run(ROUTES[route]), expected, rtol=1e-7)  # the record is kept in float32
    oracle.close(run(Route(chunk_size=4), traced=True), expected, rtol=1e-7)


@pytest.mark.parametrize("memory", ["cached", "curvature_recomputed", "recomputed"])
@pytest.mark.parametrize("name", ["ngd", "newton"])
def test_layerwise_refits_agree(name: str, memory: Any) -> None:
    case = next(c for c in staged.STAGED if c.name == "masked")
    params, inputs, loss = case.build()
    objective, batch = staged_objective(case, inputs, loss)
    refit = llqr.Refit(steps=3)

    def run(route: Route) -> np.ndarray:
        tx = llqr.scale_by_llqr(metric=name, damping=0.5, route=route, refit=refit)
        return oracle.flat(llqr.refresh(tx, tx.init(params), params, objective.bind(batch)))

    oracle.close(run(Route(layerwise=True, memory=memory)), run(Route()), rtol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"probe": "fisher", "probes": 2},
        {"probe": "minibatch", "probes": 2},
        {"solver": "cg_zoom_hz"},
        {"fresh_batches": True, "probe": "fisher"},
    ],
    ids=lambda options: "+".join(map(str, options.values())),
)
def test_chunks_with_every_kind_of_refit(options: Any) -> None:
    """The same numbers; and the second refit compiles nothing."""
    case = cases.MLP_MASKED
    bound = case.bound
    if "fresh_batches" in options:
        bound = case.objective.bind(jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), case.batch))
    refit = llqr.Refit(steps=2, **options)
    found = []
    for route in (Route(), Route(chunk_size=4)):
        tx = llqr.scale_by_llqr(structure="diagonal", damping=0.5, route=route, refit=refit)
        state = llqr.refresh(tx, tx.init(case.params), case.params, bound)
        found.append(oracle.flat(state.blocks))
    oracle.close(found[1], found[0], rtol=1e-9)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    llqr.refresh(tx, state, case.params, bound)
    jax.monitoring.clear_event_listeners()
    assert compiled == []


def test_chunks_run_in_python_on_cpu_and_compile_once() -> None:
    """XLA runs convolution gradients in a compiled loop 30 to 50 times slower there."""
    case, shapes = cases.MLP_TANH, []

    def counted(params: Any, batch: Any) -> Any:
        shapes.append(batch["x"].shape[0])
        return case.objective.forward(params, batch)

    tx = llqr.scale_by_llqr(route=Route(chunk_size=4), refit=llqr.Refit(steps=4))
    objective = replace(case.objective, forward=counted).bind(case.batch)
    state = llqr.refresh(tx, tx.init(case.params), case.params, objective)
    assert set(shapes) == {3, 6}  # six examples: the whole batch for its shape alone
    first = shapes.count(3)
    llqr.refresh(tx, state, case.params, objective)
    assert shapes.count(3) == first


def test_chunks_are_as_small_as_their_count_allows() -> None:
    batch = {"x": jnp.arange(10.0), "none": None, "shared": jnp.array(3.0)}
    bound = llqr.Objective(lambda p, b: b["x"] * p, lambda z, b: jnp.sum(z)).bind(batch)
    sizes = {size: (len(bound.split(size)), bound.split(size).size) for size in (1, 4, 6, 9, 1000)}
    assert sizes == {1: (10, 1), 4: (3, 4), 6: (2, 5), 9: (2, 5), 1000: (1, 10)}
    chunks = bound.split(4)
    np.testing.assert_array_equal(chunks[2].batch["x"], [2, 5, 8, 9])
    assert chunks[1].batch["none"] is None
    assert float(chunks[1].batch["shared"]) == 3


# --- what cannot be split -------------------------------------------------------------------------


@pytest.mark.wrong_type
def test_errors() -> None:
    case = cases.MLP_TANH
    with pytest.raises(ValueError, match="needs the stages of the model"):
        llqr.linearize(case.bound, case.params, route=Route(layerwise=True))
    scalar = llqr.Objective(lambda p, b: jnp.sum(p["in"]["bias"]) * b["x"].sum(), lambda z, b: z)
    with pytest.raises(ValueError, match="examples on their first axis"):
        llqr.linearize(scalar.bind(case.batch), case.params, route=Route(chunk_size=2))
    uneven = {"x": case.batch["x"], "y": case.batch["y"][:-1]}
    with pytest.raises(ValueError, match=r"the same number of them, not \[5, 6\]"):
        case.objective.bind(uneven).split(2)
    with pytest.raises(ValueError, match="chunk_size must be >= 1"):
        Route(chunk_size=0)
    with pytest.raises(ValueError, match="leave memory at 'cached' with chunk_size"):
        Route(chunk_size=2, memory="recomputed")
    with pytest.raises(ValueError, match="needs memory='recomputed'"):
        Route(checkpoint_policy="dots_no_batch_dims")
    with pytest.raises(ValueError, match="unknown Route: memory 'cashed': did you mean 'cached'"):
        Route(memory="cashed")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="fused route"):
        Route(layerwise=True, chunk_size=2)
    watching = lqr.stages_from_functions([("a", lambda p, x: x @ p)]).as_forward(watch=["a"])
    with pytest.raises(ValueError, match="without watch"):
        llqr.linearize(
            llqr.Objective(watching, lambda z, b: jnp.sum(z["output"])).bind(jnp.ones((2, 2))),
            {"a": jnp.ones((2, 2))},
            route=Route(layerwise=True),
        )
