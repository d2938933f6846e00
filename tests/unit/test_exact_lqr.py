"""The exact layerwise LQR against dense matrices: Hessians, KKT systems, the fused route."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr import lqr
from tests.staged import SHARED, STAGED

CASES = pytest.mark.parametrize("case", STAGED, ids=lambda case: case.name)
METRICS = ("ngd", "reverse_kl", "gauss_newton", "renyi", "newton", "renyi_zero")
FULL = ("newton", "renyi_zero")


def damping_of(case, metric):
    return case.damping * (10.0 if metric == "renyi_zero" else 1.0) if metric in FULL else 0.1


def problem(case, metric, **options):
    params, inputs, loss = case.build()
    options.setdefault("damping", damping_of(case, metric))
    staged = options.pop("staged", case.model)
    return lqr.linearize(
        staged, params, inputs, loss=loss, metric=metric, mask=case.rows, **options
    )


def flat_of(controls):
    """Flatten in the order of the parameters' keys, as ravel_pytree does."""
    return np.asarray(ravel_pytree(controls)[0])


def dense(case, metric):
    """g and C from jax.grad, jax.hessian and per-row matrices: no code of the library's."""
    params, inputs, loss = case.build()
    flat, unravel = ravel_pytree(params)
    logits = lambda v: case.model(unravel(v), inputs)  # noqa: E731
    g = np.asarray(jax.grad(lambda v: loss(logits(v)))(flat))
    z = logits(flat)
    keep = np.ones(len(z)) if case.mask is None else np.asarray(case.mask, float)
    if metric == "newton":
        return g, np.asarray(jax.hessian(lambda v: loss(logits(v)))(flat))
    if metric == "renyi_zero":
        divergence = lambda v: -jnp.sum(keep[:, None] * jax.nn.log_softmax(logits(v)))  # noqa: E731
        return g, np.asarray(jax.hessian(divergence)(flat))
    jacobian = np.asarray(jax.jacobian(logits)(flat))
    if metric == "gauss_newton":
        q = np.asarray(jax.hessian(loss)(z))
        return g, np.einsum("rkn,rksl,slm->nm", jacobian, q, jacobian)
    s = np.asarray(jax.nn.softmax(z))
    fisher = np.einsum("rk,kl->rkl", s, np.eye(s.shape[1])) - np.einsum("rk,rl->rkl", s, s)
    factor = 0.5 if metric == "renyi" else 1.0
    return g, factor * np.einsum("r,rkn,rkl,rlm->nm", keep, jacobian, fisher, jacobian)


def random_control(case, seed=5):
    params = case.build()[0]
    flat, unravel = ravel_pytree(params)
    return unravel(jnp.asarray(np.random.default_rng(seed).normal(size=flat.size)))


@pytest.mark.parametrize(
    ("case", "metric"),
    [
        (case, metric)
        for case in STAGED + SHARED
        for metric in (METRICS if case.name in ("three stages", "masked") else ("ngd", "newton"))
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_cost_gradient_and_solution(case, metric):
    """Rollout == fused == explicit quadratic; adjoint == explicit; Riccati == CG == dense solve."""
    g, c = dense(case, metric)
    damped = c + damping_of(case, metric) * np.eye(g.size)
    p, u = problem(case, metric), random_control(case)
    v = flat_of(u)
    explicit, slope = g @ v + v @ damped @ v / 2, g + damped @ v
    value, gradient = lqr.cost_and_gradient(p, u)
    np.testing.assert_allclose(value, explicit, rtol=1e-12)
    np.testing.assert_allclose(lqr.cost(p, u), explicit, rtol=1e-12)
    scale = np.abs(slope).max()
    np.testing.assert_allclose(flat_of(gradient), slope, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(flat_of(lqr.gradient(p)), g, rtol=1e-12, atol=1e-13)

    params, inputs, loss = case.build()
    mask = None if case.mask is None else (lambda _: case.rows)
    objective = llqr.Objective(case.model.as_forward(), lambda z, _: loss(z), mask)
    fused = llqr.linearize(objective.bind(inputs), params, metric, damping=damping_of(case, metric))
    np.testing.assert_allclose(fused.value(u), explicit, rtol=1e-12)

    expected = -np.linalg.solve(damped, g)
    scale = np.linalg.norm(expected)
    if case in SHARED:
        with pytest.raises(
            ValueError, match=r"'mix' shares the parameters of \['embed'\].*solve_cg"
        ):
            lqr.riccati(p)
    else:
        solution = lqr.riccati(p)
        assert np.linalg.norm(flat_of(solution.controls) - expected) < 1e-10 * scale
        np.testing.assert_allclose(solution.objective, g @ expected / 2, rtol=1e-9)
    by_cg = flat_of(lqr.solve_cg(p, tolerance=1e-13))
    assert np.linalg.norm(by_cg - expected) < 1e-10 * scale


@CASES
@pytest.mark.parametrize("metric", ["ngd", "newton"])
def test_riccati_is_the_solution_of_the_kkt_system(case, metric):
    """The constrained problem in controls, states and multipliers, from the stage matrices."""
    p = problem(case, metric)
    stages = [s for s in p.stages if s.state is not None or not s.passive]
    sizes_u = [flat_of(s.control).size for s in stages]
    sizes_x = [flat_of(s.output).size for s in stages]
    nu, nx = sum(sizes_u), sum(sizes_x)
    hessian, linear = np.zeros((nu + nx, nu + nx)), np.zeros(nu + nx)
    constraint = np.zeros((nx, nu + nx))
    at_u, at_x, row = 0, nu, 0
    previous = None
    for s, m, n in zip(stages, sizes_u, sizes_x, strict=True):
        us, xs, rows = slice(at_u, at_u + m), slice(at_x, at_x + n), slice(row, row + n)
        constraint[rows, xs] = np.eye(n)
        hessian[xs, xs] += s.W.as_matrix()
        if m:
            hessian[us, us] += np.asarray(s.R.as_matrix()) + p.damping * np.eye(m)
            constraint[rows, us] = -np.asarray(s.B.as_matrix())
        if s.state is not None:
            constraint[rows, previous] = -np.asarray(s.A.as_matrix())
            hessian[previous, previous] += s.Q.as_matrix()
            if m:
                hessian[us, previous] += s.M.as_matrix()
                hessian[previous, us] += np.asarray(s.M.as_matrix()).T
        previous, at_u, at_x, row = xs, at_u + m, at_x + n, row + n
    linear[previous] = flat_of(p.cotangent)
    kkt = np.block([[hessian, constraint.T], [constraint, np.zeros((nx, nx))]])
    found = np.linalg.solve(kkt, np.concatenate([-linear, np.zeros(nx)]))[:nu]
    ours = np.concatenate(
        [flat_of({k: lqr.solve(p)[k] for k in s.control}) for s in stages if s.control]
    )
    assert np.linalg.norm(found - ours) < 1e-10 * np.linalg.norm(ours)


@CASES
def test_operators_are_the_derivatives(case):
    """A, B, R, Q, M of newton against jax.jacobian and jax.hessian of each stage."""
    params, inputs, _ = case.build()
    state = inputs
    for segment, stage in zip(case.model.segments, problem(case, "newton").stages, strict=True):
        control = segment.control(params)
        leaves, tree = jax.tree.flatten(state)
        movable = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        x, into_x = ravel_pytree([leaf for leaf, m in zip(leaves, movable, strict=True) if m])
        u, into_u = ravel_pytree(control)

        def run(x, u, leaves=leaves, tree=tree, movable=movable, into_x=into_x, into_u=into_u,
                segment=segment):  # fmt: skip
            fresh = iter(into_x(x) if x.size else [])
            whole = [next(fresh) if m else leaf for m, leaf in zip(movable, leaves, strict=True)]
            out = segment(into_u(u), tree.unflatten(whole))
            return ravel_pytree(
                [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            )[0]

        costate = flat_of(stage.costate)
        hamiltonian = lambda x, u, run=run, costate=costate: costate @ run(x, u)  # noqa: E731
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)  # noqa: E731
        if u.size:
            close(stage.B.as_matrix(), jax.jacobian(run, 1)(x, u))
            close(stage.R.as_matrix(), jax.hessian(hamiltonian, 1)(x, u))
            y, v = jax.random.normal(jax.random.key(0), costate.shape), stage.B
            pulled = flat_of(v.vjp(ravel_pytree(stage.output)[1](y)))
            close(pulled, np.asarray(v.as_matrix()).T @ y)
        if stage.state is not None:
            close(stage.A.as_matrix(), jax.jacobian(run, 0)(x, u))
            close(stage.Q.as_matrix(), jax.hessian(hamiltonian, 0)(x, u))
            if u.size:
                cross = jax.jacobian(jax.grad(hamiltonian, 1), 0)(x, u)
                close(stage.M.as_matrix(), cross)
        else:
            for what in "AQM":
                with pytest.raises(ValueError, match=f"has no {what}: no control acts before"):
                    getattr(stage, what)
        state = segment(control, state)


@pytest.mark.parametrize("case", STAGED + SHARED, ids=lambda case: case.name)
@pytest.mark.parametrize("metric", ["ngd", "newton"])
def test_recomputed_and_grouped_give_the_same_numbers(case, metric):
    u = random_control(case)
    value, gradient = lqr.cost_and_gradient(problem(case, metric), u)
    solve = lambda p: lqr.solve_cg(p, tolerance=1e-13) if case in SHARED else lqr.solve(p)  # noqa: E731
    step = solve(problem(case, metric))
    names = list(case.model.names)
    pairs = [names[i : i + 2] for i in range(0, len(names), 2)]
    for other in (
        problem(case, metric, memory="recomputed"),
        problem(case, metric, staged=case.model.grouped(pairs)),
        problem(case, metric, staged=case.model.grouped([names])),
    ):
        v, g = lqr.cost_and_gradient(other, u)
        np.testing.assert_allclose(v, value, rtol=1e-12)
        np.testing.assert_allclose(flat_of(g), flat_of(gradient), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(flat_of(solve(other)), flat_of(step), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("where", ["layer0", "layer1"])
def test_a_metric_on_an_inner_state(where):
    """Exact in both routes: |delta x|^2 / 2 there plus the Fisher metric on the output."""
    case = next(c for c in STAGED if c.name == "three stages")
    params, inputs, loss = case.build()
    flat, unravel = ravel_pytree(params)
    g, fisher = dense(case, "ngd")
    at = case.model.names.index(where) + 1

    def inner(v):
        x = inputs
        for segment in case.model.segments[:at]:
            x = segment(segment.control(unravel(v)), x)
        return x.ravel()

    j = np.asarray(jax.jacobian(inner)(flat))
    damped = fisher + j.T @ j + 0.1 * np.eye(g.size)
    p = lqr.linearize(
        case.model, params, inputs, loss=loss, damping=0.1,
        metric={where: "gaussian", "output": "ngd"},
    )  # fmt: skip
    u = random_control(case)
    v = flat_of(u)
    value, gradient = lqr.cost_and_gradient(p, u)
    np.testing.assert_allclose(value, g @ v + v @ damped @ v / 2, rtol=1e-12)
    np.testing.assert_allclose(flat_of(gradient), g + damped @ v, rtol=1e-11)
    expected = -np.linalg.solve(damped, g)
    np.testing.assert_allclose(flat_of(lqr.solve(p)), expected, rtol=1e-9, atol=1e-12)

    forward = case.model.as_forward(watch=[where])
    objective = llqr.Objective(forward, lambda z, _: loss(z["output"])).bind(inputs)
    fused = llqr.linearize(objective, params, {"output": "ngd", where: "gaussian"}, damping=0.1)
    np.testing.assert_allclose(fused.value(u), value, rtol=1e-12)


@pytest.mark.parametrize("metric", ["ngd", "newton"])
def test_feedback_and_values(metric):
    """u = -(K delta + k) along the optimal path, and V, v are the cost-to-go."""
    case = next(c for c in STAGED if c.name == "passive")
    p = problem(case, metric)
    solution = lqr.riccati(p)
    assert solution.values[0] is None  # the shift in front of the first control
    delta = None
    for i, stage in enumerate(p.stages):
        control = {name: solution.controls[name] for name in stage.control}
        if stage.name in solution.feedback:
            law = solution.feedback[stage.name]
            u = -law.offset if law.gain is None else -(law.gain @ flat_of(delta) + law.offset)
            np.testing.assert_allclose(flat_of(control), u, rtol=1e-12)
        if delta is None and stage.passive:
            continue
        delta = stage.dynamics(delta, control)
        # From here the best that is left: compare with other controls for the same start.
        V, v = solution.values[i]
        d = flat_of(delta)
        best = _rest(p, i + 1, delta, solution.controls)
        np.testing.assert_allclose(d @ V @ d / 2 + v @ d + _constant(p, i + 1), best, rtol=1e-8)
    np.testing.assert_allclose(lqr.cost(p, solution.controls), solution.objective, rtol=1e-10)


def _rest(p, start, delta, controls):
    """The cost of stages `start`.. from a given delta, W at the start included."""
    total = 0.0
    metric = p.stages[start - 1].metric
    if metric is not None:
        total += sum(float(jnp.sum(a * b)) for a, b in zip(delta, metric(delta), strict=True)) / 2
    for stage in p.stages[start:]:
        u = {name: controls[name] for name in stage.control}
        if stage.curvature is not None:
            on_x, on_u = stage.curvature(delta, u)
            total += float(flat_of(delta) @ flat_of(on_x)) / 2
            total += float(flat_of(u) @ flat_of(on_u)) / 2 if u else 0.0
        total += 0.5 * p.damping * float(flat_of(u) @ flat_of(u)) if u else 0.0
        delta = stage.dynamics(delta, u)
        if stage.metric is not None:
            total += float(flat_of(delta) @ flat_of(stage.metric(delta))) / 2
    return total + float(flat_of(p.cotangent) @ flat_of(delta))


def _constant(p, start):
    """-1/2 b.S^-1 b of the stages from `start` on, from the recursion's own objective."""
    solution = lqr.riccati(p)
    total = 0.0
    for i, stage in enumerate(p.stages[start:], start):
        if not stage.passive:
            b = np.asarray(stage.B.as_matrix()).T @ np.asarray(solution.values[i][1])
            total += -0.5 * float(b @ np.asarray(solution.feedback[stage.name].offset))
    return total


class TestErrors:
    def case(self):
        return next(c for c in STAGED if c.name == "three stages")

    def test_newton_without_a_minimum_names_the_stage(self):
        p = problem(self.case(), "newton", damping=0.0)
        with pytest.raises(lqr.NonConvexError, match=r"stage 'layer\d': .* has the eigenvalue -"):
            lqr.solve(p)
        with pytest.raises(lqr.NonConvexError, match="no minimum"):
            lqr.solve_cg(p)
        inside = jax.jit(lqr.solve)(p)
        assert np.isnan(flat_of(inside)).all()

    def test_too_few_steps_are_told(self):
        with pytest.raises(ValueError, match="stopped after 2 steps at the relative residual"):
            lqr.solve_cg(problem(self.case(), "ngd"), max_steps=2)

    def test_sizes_are_bounded(self):
        p = problem(self.case(), "ngd")
        with pytest.raises(ValueError, match=r"'layer0' has a state of 16 entries.*solve_cg"):
            lqr.solve(p, max_size=15)
        with pytest.raises(ValueError, match=r"'layer1' has a control of 25 entries"):
            lqr.solve(p, max_size=24)

    def test_controls_of_another_shape(self):
        p = problem(self.case(), "ngd")
        with pytest.raises(ValueError, match="controls must be shaped like the parameters"):
            lqr.cost(p, {"layer0": p.params["layer0"]})

    def test_names(self):
        case = self.case()
        params, inputs, loss = case.build()
        with pytest.raises(ValueError, match=r"unknown stage .* did you mean 'layer0'"):
            lqr.linearize(case.model, {**params, "layre0": params["layer0"]}, inputs, loss=loss)
        with pytest.raises(ValueError, match=r"unknown stage .* did you mean 'layer1'"):
            lqr.linearize(case.model, params, inputs, loss=loss, metric={"layre1": "ngd"})
        with pytest.raises(ValueError, match="can be placed on the output only"):
            lqr.linearize(case.model, params, inputs, loss=loss, metric={"layer1": "newton"})
        with pytest.raises(ValueError, match="did you mean 'layer2'"):
            case.model.as_forward(watch=["layre2"])
        with pytest.raises(ValueError, match="each with a name of its own"):
            lqr.stages_from_functions([("a", lambda p, x: x), ("a", lambda p, x: x)])
        with pytest.raises(ValueError, match="groups must name every stage once, in order"):
            case.model.grouped([["layer1", "layer0"], ["layer2"]])

    @pytest.mark.parametrize("metric", ["renyi_inf", "ngdd"])
    def test_metrics(self, metric):
        with pytest.raises(ValueError, match=r"renyi_inf is undefined|unknown divergence"):
            problem(self.case(), metric)


def test_an_explicit_right_side():
    case = next(c for c in STAGED if c.name == "skip")
    p, r = problem(case, "ngd"), random_control(case, seed=9)
    _, c = dense(case, "ngd")
    expected = -np.linalg.solve(c + 0.1 * np.eye(len(c)), flat_of(r))
    np.testing.assert_allclose(flat_of(lqr.solve(p, gradient=r)), expected, rtol=1e-9, atol=1e-11)


def test_stages_with_a_context():
    """Constants of the batch reach every stage by name, on both routes and in both memories."""
    scaled = lambda p, x, context: jnp.tanh(x @ p * context["scale"])  # noqa: E731
    staged = lqr.stages_from_functions([("first", scaled), ("second", scaled)])
    rng = np.random.default_rng(0)
    params = {
        "first": jnp.asarray(rng.normal(size=(3, 4))),
        "second": jnp.asarray(rng.normal(size=(4, 2))),
    }
    batch = {"x": jnp.asarray(rng.normal(size=(5, 3))), "scale": jnp.asarray(rng.normal(size=()))}
    forward = staged.as_forward(lambda b: b["x"], context=lambda b: {"scale": b["scale"]})
    objective = llqr.Objective(forward, lambda z, b: jnp.mean(z**2)).bind(batch)
    expected = jnp.tanh(
        jnp.tanh(batch["x"] @ params["first"] * batch["scale"]) @ params["second"] * batch["scale"]
    )
    np.testing.assert_allclose(objective.outputs(params), expected, rtol=1e-14)
    u = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    plain = llqr.linearize(objective, params, "newton").product(u)
    for memory in ("cached", "recomputed"):
        route = llqr.Route(layerwise=True, memory=memory)
        found = llqr.linearize(objective, params, "newton", route=route).product(u)
        np.testing.assert_allclose(flat_of(found), flat_of(plain), rtol=1e-11)


def test_a_stage_reads_only_what_comes_before_it():
    identity = lambda _, x: x  # noqa: E731
    with pytest.raises(ValueError, match="stage 'a': unknown earlier stage 'b'"):
        lqr.stages_from_functions([("a", identity, ("b",)), ("b", identity)])
