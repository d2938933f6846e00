"""When and how a preconditioner is learned: the options of refits, published and streaming."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from llqr import metrics
from llqr.curvature.route import Route
from llqr.errors import check_choice, check_integer, check_range
from llqr.metrics import Reduction
from llqr.typing import Array, Bool, Int, PyTree, Schedule

Probe: TypeAlias = Literal["gradient", "minibatch", "gaussian", "fisher"]

LINE_SEARCHES = ("cg_zoom_hz", "cg_back_pr+")
"""Solvers with a line search of their own; see `llqr.refit.solvers`."""

DETERMINISTIC = ("cg", *LINE_SEARCHES)
"""Solvers that compare steps: they need the same objective at every one."""

SOLVERS = ("momentum", "sgd", "adam", "relative", *DETERMINISTIC)
"""The names of `llqr.refit.solvers`."""

SolverLike: TypeAlias = str | optax.GradientTransformation


@dataclass(frozen=True, kw_only=True)
class Refit:
    """When and how the preconditioner is learned. Defaults are the papers'.

    Args:
      every: a refit is due when (count - start) is a multiple of this number of update
        calls; an int >= 1, or a schedule count -> int. None: never, refits come from outside
        only (`llqr.refresh`), and `update` needs no objective.
      start: no refit before this count.
      until: no refit at or after this count; None: never stops.
      steps: inner steps of one refit, a Python int; the most, with a tolerance.
      tolerance: stop when an inner step changes the objective by less than this share of it;
        0: never.
      learning_rate: of the inner solver; a number > 0, or a schedule of the count.
      anneal: let the learning rate fall linearly to zero over the refit, which averages out
        the noise of random directions.
      solver: a name of `llqr.solvers.SOLVERS`, or any optax transformation that needs nothing
        but gradients and parameters: it sees the clipped gradient, and its updates are added
        as they are (learning_rate and momentum do not enter).
      momentum: of the solver "momentum".
      clip_norm: largest L2 norm of the gradient of each stored array; None: no clipping.
      clip_value: largest absolute entry of that gradient; None: no clipping.
      warm_start: start from the current arrays; False: from the identity, and the guard then
        asks whether the objective fell below the identity's. Structures with a memory always
        start from it.
      ema_decay: d in [0, 1]; arrays become d old + (1 - d) new. A number or a schedule.
        Memories are left out.
      normalize_gradient: use h = -g / |g|.
      allow_grad_inversion: allow P to turn the sign of gradients: entries of elementwise
        blocks are not clamped to >= 1e-8 and blocks with h.Ph <= 0 are not guarded.
      probe: directions h. "gradient": the refit batch's own, the published method;
        "minibatch": the gradient of a quarter of its rows; "gaussian": N(0, I); "fisher": the
        gradient for labels drawn from the model, with covariance C (and a tenth of the damping
        on top, so that directions in which the batch has no curvature stay where they are).
      probes: how many directions at once; 1 with "gradient".
      fresh_batches: a batch of its own for every inner step: the objective's batch then has
        one more axis in front, of length `steps`.
      per_example: the mean of one problem for each example, with that example's gradient
        and curvature, in place of one problem for the batch. It holds several copies of the
        parameters for each example.
      seed: of probes and of the fresh vectors of structures with a memory; the number of the
        refit and the inner step are folded into it.

    Raises:
      ValueError: a value outside its range, or options that exclude each other.
      TypeError: a value of a wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> refit = llqr.Refit(every=100, until=1000, steps=20, probe="fisher", probes=2)
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac", refit=refit)
      >>> [count for count in (0, 50, 900, 1000) if refit.is_due(jnp.asarray(count))]
      [0, 900]

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """

    every: int | Schedule | None = 1000
    start: int = 0
    until: int | None = None
    steps: int = 50
    tolerance: float = 0.0
    learning_rate: float | Schedule = 1e-3
    anneal: bool = False
    solver: SolverLike = "momentum"
    momentum: float = 0.9
    clip_norm: float | None = 5.0
    clip_value: float | None = None
    warm_start: bool = True
    ema_decay: float | Schedule = 0.0
    normalize_gradient: bool = False
    allow_grad_inversion: bool = False
    probe: Probe = "gradient"
    probes: int = 1
    fresh_batches: bool = False
    per_example: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("Refit: steps", self.steps, low=1)
        check_integer("Refit: probes", self.probes, low=1)
        check_integer("Refit: start", self.start, low=0)
        check_integer("Refit: until", self.until, low=0)
        check_integer("Refit: seed", self.seed, low=0)
        if not isinstance(self.solver, optax.GradientTransformation):
            check_choice("solver", self.solver, SOLVERS)
        check_choice("probe", self.probe, get_args(Probe))
        for name in ("every", "learning_rate", "ema_decay", "clip_norm", "momentum", "tolerance"):
            if isinstance(getattr(self, name), jax.Array):
                raise TypeError(
                    f"Refit: {name} must be a Python number, or a schedule where it may change "
                    "(options are static), not an array."
                )
        if not callable(self.every):
            check_integer("Refit: every", self.every, low=1)
        check_range("Refit: learning_rate", self.learning_rate, low=0, open_low=True)
        check_range("Refit: tolerance", self.tolerance, low=0)
        check_range("Refit: momentum", self.momentum, low=0, high=1)
        check_range("Refit: clip_norm", self.clip_norm, low=0, open_low=True)
        check_range("Refit: clip_value", self.clip_value, low=0, open_low=True)
        check_range("Refit: ema_decay", self.ema_decay, low=0, high=1)
        why = None
        if self.probe == "gradient" and self.probes != 1:
            why = f"probe='gradient' is one fixed direction: probes must be 1, not {self.probes}"
        elif self.per_example and self.probe != "gradient":
            why = f"per_example learns on each example's gradient, not on probe={self.probe!r}"
        elif self.normalize_gradient and self.probe != "gradient":
            why = f"normalize_gradient has no effect with probe={self.probe!r}"
        elif self.tolerance and (self.fresh_batches or self._random):
            why = "fresh batches and probes change the objective at every step: tolerance must be 0"
        elif self.anneal and self.solver in DETERMINISTIC:
            why = f"solver={self.solver!r} finds its own lengths: anneal has no effect"
        elif self.fresh_batches and self.solver in DETERMINISTIC:
            why = f"solver={self.solver!r} needs one objective for all steps: no fresh_batches"
        elif self.until is not None and self.until < self.start:
            why = f"until={self.until} lies before start={self.start}"
        if why:
            raise ValueError(f"Refit: {why}.")

    @property
    def _random(self) -> bool:
        return self.probe != "gradient" and self.solver not in DETERMINISTIC

    @property
    def batched(self) -> bool:
        """Whether there are several directions at once, on a leading axis."""
        return self.per_example or self.probe != "gradient"

    def is_due(self, count: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        """Return whether a refit is due before update call number `count`, counted from 0.

        For an int a Python bool, for an array an array.
        """
        every = self.every
        if every is None:
            return _never(count)
        if callable(every) and isinstance(count, int):
            with jax.ensure_compile_time_eval():
                every = max(round(float(every(count))), 1)
        elif callable(every):  # a schedule gives floats
            every = jnp.maximum(jnp.round(every(count)), 1).astype(jnp.result_type(count))
        offset = count - self.start
        due = (offset >= 0) & (offset % every == 0)
        return due if self.until is None else due & (count < self.until)


def _never(count: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
    return False if isinstance(count, int) else jnp.zeros_like(count, dtype=bool)


WIDE_TURNS, WIDE_FOLLOWS = 5, 2
"""Wide sides turn at four refits and then at every fifth, and follow every second gradient: to
orthogonalise a side of 784 takes as long as a hundred gradients of a small network."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """How P follows the training: `refit=llqr.Streaming()` in place of `llqr.Refit`.

    With probes, a step with a refit costs one more gradient, of a quarter of the batch, so that the
    default takes 1.03 gradients a step. It works for the structures e-kfac (with its embedding
    rules, e-kfac-gpt), diagonal and kfac, which takes 1.08, and for those of your own with such
    sides; the metric must be one from which labels can be drawn. Without, see `probe`.

    Args:
      every: k, steps from refit to refit, after the warm-up. None: none by themselves, not even
        in the warm-up; they come from outside only (`llqr.refresh`), and `update` needs no
        objective.
      warmup: so many steps from `start` on have a refit each.
      start: no refit before this count.
      until: no refit at or after this count; None: never stops.
      momentum: mu in [0, 1); P multiplies the momentum m.
      nesterov: it multiplies G + mu m instead.
      basis_decay: b in [0, 1), of the second moments of the gradient.
      spectrum_decay: a in [0, 1], of the curvature c: a mean over the first refits, and then a
        running mean; 1: the mean over all.
      signal_decay: in [0, 1), of the squares of the gradient in the bases. Each entry of P m is
        weighed by the share of the gradient that agrees from step to step, |mean| by root mean
        square; embeddings count as agreeing, and matrices of kfac are not weighed. None: none is.
      probe: where curvature is seen: "fisher", in probes h, gradients for labels drawn from the
        model, which take an objective; "gradient", in the gradients themselves, whose squares are
        averaged: `update` then needs no objective, a step costs one gradient, and any loop will do.
        Not with kfac. The squares follow `signal_decay` (`basis_decay` where that is None), `every`
        is how often bases turn and the spectrum is set, and `spectrum_decay`, `probes`,
        `probe_share`, `rate` and `seed` have no effect. (`llqr.Refit` has a probe of this name,
        one batch's own direction.)
      orthogonalize: whether what P makes of a matrix is orthogonalised: five Newton-Schulz steps of
        Muon's bring its singular values near to one another, and its length stays. Not vectors,
        embeddings, matrices of kfac, nor what is diagonal. It costs products of the size of the
        layer's own. None: with probe="gradient", whose squares say less of the curvature.
      probes: h drawn at each refit.
      probe_share: in (0, 1], of the examples of the batch on which they are drawn: at most this
        part, as the batch is cut into equal ones, and another of them at each refit. A probe sums
        over examples with random signs, and what it says of the curvature is hardly less uncertain
        with all of them. Where examples lie, the objective's `batch_axes` say. All examples are
        taken where the arrays of a batch do not agree on their number, and with
        divergence_reduction="sum", whose scale depends on it.
      wide: sides longer than this turn and follow more rarely.
      rate: eta in (0, 1), of kfac.
      seed: of the probes; the number of the refit is folded into it.

    Raises:
      ValueError: a value outside its range.
      TypeError: a value of a wrong type.

    Example:
      >>> import optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.01), structure="e-kfac", refit=llqr.Streaming())
      >>> [step for step in range(50) if llqr.Streaming().is_due(step) and step >= 20]
      [20, 30, 40]

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230, for the
      objective. Vyas et al., SOAP, arXiv 2409.11321, for the bases. Li, Preconditioned
      Stochastic Gradient Descent, arXiv 1512.04202, for kfac's relative steps. Jordan et al., Muon,
      kellerjordan.github.io/posts/muon, for the orthogonal steps.
    """

    every: int | None = 10
    warmup: int = 10
    start: int = 0
    until: int | None = None
    momentum: float = 0.9
    nesterov: bool = True
    basis_decay: float = 0.95
    spectrum_decay: float = 0.9
    signal_decay: float | None = 0.95
    probe: Literal["fisher", "gradient"] = "fisher"
    orthogonalize: bool | None = None
    probes: int = 1
    probe_share: float = 0.25
    wide: int = 256
    rate: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("every", 1), ("warmup", 0), ("start", 0), ("until", 0),
                          ("probes", 1), ("wide", 1), ("seed", 0)):  # fmt: skip
            check_integer(f"Streaming: {name}", getattr(self, name), low=low)
        check_choice("Streaming: probe", self.probe, ("fisher", "gradient"))
        if self.orthogonalize not in (None, True, False):
            raise TypeError(
                f"Streaming: orthogonalize must be True, False or None, got {self.orthogonalize!r}."
            )
        check_range("Streaming: probe_share", self.probe_share, low=0, open_low=True, high=1)
        for name, high in (("momentum", 1), ("basis_decay", 1), ("spectrum_decay", 1),
                           ("signal_decay", 1), ("rate", 1)):  # fmt: skip
            value = getattr(self, name)
            if name == "signal_decay" and value is None:
                continue
            check_range(f"Streaming: {name}", value, low=0, high=high, open_low=name == "rate")
            if value == 1 and name != "spectrum_decay":
                raise ValueError(f"Streaming: {name} must be below 1, got {value!r}.")
        if self.until is not None and self.until < self.start:
            raise ValueError(f"Streaming: until={self.until} lies before start={self.start}.")

    def is_due(self, count: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        """Return whether step number `count`, from 0, has a refit; for an int, a Python bool."""
        if self.every is None:
            return _never(count)
        offset = count - self.start
        due = (offset >= 0) & ((offset < self.warmup) | (offset % self.every == 0))
        return due if self.until is None else due & (count < self.until)

    @property
    def orthogonal(self) -> bool:
        """Whether steps of matrices are orthogonalised."""
        return self.probe == "gradient" if self.orthogonalize is None else self.orthogonalize

    def turns_wide(self, number: Int[Array, ""]) -> Bool[Array, ""]:
        """Return whether wide sides turn at refit `number`: from 1 to 4, and 6, 11 and so on."""
        return (number < WIDE_TURNS) | ((number - 1) % WIDE_TURNS == 0)

    def follows_wide(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Return whether wide sides follow step `count`: each early one, then every second."""
        return (count < self.start + self.warmup) | (count % WIDE_FOLLOWS == 0)


def check_options(refit: Refit, metric: PyTree, reduction: Reduction, route: Route) -> None:
    """Check the options of a refit against those around it.

    Args:
      refit: the options.
      metric: a resolved metric, or a tree of them.
      reduction: over rows.
      route: how curvature products are computed.

    Raises:
      ValueError: they exclude each other.
    """
    why = None
    if refit.probe == "fisher" and not metrics.can_sample(metric):
        why = f"probe='fisher' needs a metric from which labels can be drawn: {metrics.SAMPLED}"
    elif refit.per_example and route.chunk_size is not None:
        why = "per_example splits the batch already: chunk_size must be None"
    elif refit.per_example and route.axis_name:
        why = "per_example has one problem for each example: axis_name must be None"
    elif refit.per_example and reduction == "unit":
        why = (
            "per_example has one curvature for each example: divergence_reduction='unit' needs "
            "that of the batch"
        )
    if why:
        raise ValueError(f"{why}.")
