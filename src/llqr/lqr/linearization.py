"""From a staged model, a batch and a metric to its LQR problem."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import jax
import jax.numpy as jnp

from llqr import metrics
from llqr.curvature import derivatives
from llqr.curvature.route import Memory
from llqr.errors import check_choice, check_range, unknown
from llqr.lqr.problem import LQRProblem, Stage, Tangent
from llqr.metrics import Reduction
from llqr.stages import Segment, StagedModel
from llqr.tree import check_inexact
from llqr.typing import Array, Float, Number, PyTree


def linearize(
    staged: StagedModel,
    params: Mapping[str, PyTree],
    inputs: PyTree,
    *,
    loss: Callable[[PyTree], Float[Array, ""]],
    metric: Any = "ngd",
    damping: Number = 0.0,
    divergence_reduction: Reduction = "sum",
    mask: PyTree | None = None,
    memory: Memory = "cached",
) -> LQRProblem:
    """Return the LQR problem of a staged model at `params` on one batch.

    Args:
      staged: the model.
      params: parameters by stage name; stages without an entry are passive.
      inputs: x_0; anything that the first stage takes, integers too.
      loss: outputs -> scalar.
      metric: see `llqr.metrics`, placed on the outputs; or {stage name: metric}, each placed
        on that stage's state ("output" names the final one). Metrics other than those of the
        loss, and of a full Hessian, can be placed anywhere.
      damping: lambda >= 0.
      divergence_reduction: "sum" or "mean" over rows.
      mask: rows of the outputs that count; None: all.
      memory: "cached" keeps the residuals of every linearisation; "curvature_recomputed" keeps
        those of A and B alone; "recomputed" keeps states and parameters only, and linearises
        again at every product. The same numbers.

    Raises:
      ValueError: unknown metric or stage, a parameter of no stage, a value out of range, or a
        metric at a stage where it cannot be.
      TypeError: a parameter that is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp, llqr
      >>> staged = llqr.lqr.stages_from_functions([("linear", lambda w, x: x @ w)])
      >>> problem = llqr.lqr.linearize(
      ...     staged, {"linear": jnp.ones((2, 1))}, jnp.eye(2),
      ...     loss=lambda z: jnp.sum(z**2) / 2, metric="gauss_newton")
      >>> llqr.lqr.solve(problem)["linear"].tolist()
      [[-1.0], [-1.0]]

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    check_choice("memory", memory, get_args(Memory))
    check_choice("divergence_reduction", divergence_reduction, ("sum", "mean"))
    check_range("damping", damping, low=0)
    check_inexact(dict(params))
    segments = staged.segments
    for name in params:
        if name not in staged.names:
            raise ValueError(unknown("stage (a parameter's name)", name, staged.names))
    states = [inputs]
    for segment in segments:
        states.append(segment(segment.control(params), states[-1]))
    value, cotangent = jax.value_and_grad(lambda z: loss(_merge(states[-1], z)))(
        _inexact(states[-1])
    )
    potentials, full = _place(staged, metric, loss, mask, divergence_reduction)
    stages: list[Stage] = []
    costates = _costates(segments, params, states, potentials) if full else [None] * len(segments)
    moving = False  # whether delta_i can differ from zero
    for i, segment in enumerate(segments):
        control = segment.control(params)
        potential = potentials.get(segment.name)
        stages.append(
            _stage(
                segment, control, states[i], states[i + 1], moving, costates[i], potential, memory
            )
        )
        moving = moving or bool(control)
    return LQRProblem(tuple(stages), cotangent, damping, value)


def _place(
    staged: StagedModel,
    metric: Any,
    loss: Callable[[PyTree], Float[Array, ""]],
    mask: PyTree | None,
    reduction: Reduction,
) -> tuple[dict[str, Callable[[PyTree, PyTree], Float[Array, ""]]], bool]:
    """Return the potential (state, reference) -> scalar of each stage with a metric."""
    last = staged.segments[-1].name
    ends = [segment.name for segment in staged.segments]
    if not isinstance(metric, Mapping):
        metric = {last: metric}
    placed, full = {}, False
    for name, chosen in metric.items():
        name = last if name == "output" else name
        if name not in ends:
            raise ValueError(unknown("stage (the place of a metric)", name, [*ends, "output"]))
        resolved = metrics.resolve(chosen)
        full = full or metrics.is_full(resolved)
        if name != last and (metrics.is_full(resolved) or metrics.uses_loss(resolved)):
            raise ValueError(
                f"metric {chosen!r} belongs to the loss or to the whole model and can be placed "
                "on the output only."
            )
        if metrics.uses_loss(resolved):
            placed[name] = lambda z, _: loss(z)
        else:
            rows = mask if name == last else None
            placed[name] = lambda z, r, m=resolved, k=rows: metrics.potential(m, z, r, k, reduction)
    if full and len(placed) > 1:
        raise ValueError("a metric with a full Hessian cannot be combined with others.")
    return placed, full


def _costates(
    segments: tuple[Segment, ...], params: Any, states: list[PyTree], potentials: dict[str, Any]
) -> list[Tangent]:
    """Return p_1 .. p_N of the one potential, on the outputs."""
    reference = states[-1]
    potential = potentials[segments[-1].name]
    p = jax.grad(lambda z: potential(_merge(reference, z), reference))(_inexact(reference))
    costates = [p]
    for segment, x in zip(segments[:0:-1], states[-2:0:-1], strict=True):
        control = segment.control(params)
        _, pull = jax.vjp(_on_leaves(segment, x), _inexact(x), control)
        costates.insert(0, pull(costates[0])[0])
    return costates


def _stage(
    segment: Segment,
    control: dict[str, PyTree],
    x: PyTree,
    y: PyTree,
    moving: bool,
    costate: Tangent | None,
    potential: Callable[[PyTree, PyTree], Float[Array, ""]] | None,
    memory: Memory,
) -> Stage:
    function = _on_leaves(segment, x)
    state = _inexact(x) if moving else None
    # While no control has acted, the state is a constant of the linearisation.
    if moving:
        step, point = function, (state, control)
    else:
        step = lambda _, u: function(_inexact(x), u)  # noqa: E731
        point = (None, control)
    curvature = metric = None
    if costate is not None:
        hamiltonian = lambda d, u: sum(  # noqa: E731
            jnp.sum(p * f) for p, f in zip(costate, step(d, u), strict=True)
        )
        curvature = _linear(jax.grad(hamiltonian, argnums=(0, 1)), point, memory == "cached")
    if potential is not None:
        slope = jax.grad(lambda z: potential(_merge(y, z), jax.lax.stop_gradient(y)))
        metric = _linear(slope, (_inexact(y),), memory == "cached")
    dynamics = _linear(step, point, memory != "recomputed")
    shared = frozenset(segment.shared & control.keys())
    return Stage(
        segment.name, shared, control, state, _inexact(y), dynamics, curvature, metric, costate
    )


def _linear(
    function: Callable[..., Any], point: tuple[Any, ...], cached: bool
) -> Callable[..., Any]:
    """Return the linearisation of `function` at `point`, its residuals kept or recomputed."""
    with _forward_rules():
        if cached:
            return derivatives.checked(jax.linearize(function, *point)[1], *point)
    return jax.tree_util.Partial(_Recomputed(function), point)


class _Recomputed:
    """(point, *tangents) -> tangent of a function: linearised at each call."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, point: tuple[Any, ...], *tangents: Any) -> Any:
        with _forward_rules():
            return jax.jvp(self._function, point, tangents)[1]


@contextmanager
def _forward_rules() -> Iterator[None]:
    """Explain the error of JAX about functions that have a backward pass alone."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise ValueError(
            "a stage (or the loss) uses a jax.custom_vjp, which has no forward-mode rule, and "
            "stage by stage there is no way around one: define it with jax.custom_jvp, or take "
            "the fused route, llqr.Route(layerwise=False)."
        ) from error


def _on_leaves(segment: Segment, x: PyTree) -> Callable[[Tangent, Any], Tangent]:
    """The segment as a function of its input's inexact leaves and its control."""
    return lambda leaves, control: _inexact(segment(control, _merge(x, leaves)))


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _inexact(tree: PyTree) -> Tangent:
    """Leaves with a tangent: integers (tokens, masks) are constants."""
    return tuple(jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if _is_inexact(leaf))


def _merge(tree: PyTree, leaves: Tangent) -> PyTree:
    """Put inexact leaves back into a tree."""
    fresh = iter(leaves)
    return jax.tree.map(lambda leaf: next(fresh) if _is_inexact(leaf) else leaf, tree)
