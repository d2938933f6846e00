"""The oracle: loss and gradient at a perturbed point, and the state between its steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from llqr.accumulation import Axes, ValueAndGrad, mean_over_parts
from llqr.errors import check_choice, check_integer, check_range
from llqr.tree import accurate_dtype, check_inexact, leaf_names, norm, vdot, widen
from llqr.typing import Array, Bool, Float, Int, Number, Params, Schedule

from . import perturbation
from .perturbation import Direction, Kind, Norm, Sign

Product: TypeAlias = Callable[[Params], Params]


class SharpnessInfo(NamedTuple):
    """What the steps so far and the last one did; scalars, on the device."""

    active: Int[Array, ""]  # steps with a perturbation
    evaluations: Int[Array, ""]  # gradients of the whole batch
    guarded: Int[Array, ""]  # norms with w.Pw <= 0, which gave way to |w|
    perturbation_norm: Float[Array, ""]  # of the last step
    clean_loss: Float[Array, ""]  # at theta; inf where no pass went there
    perturbed_loss: Float[Array, ""]  # at theta + eps; inf where no pass went there


class SharpnessState(NamedTuple):
    """State of a SAM oracle: arrays only."""

    count: Int[Array, ""]  # steps so far
    average: Params | None  # gbar, in friendly modes
    last: Params | None  # gradient of the step before, in past_friendly_sam
    info: SharpnessInfo


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """How a perturbation is made: what `sam` and its kin return.

    Call it with a loss function to get a `SharpnessOracle`.

    Attributes:
      kind: sam, friendly, past_friendly, asam or fisher.
      rho: radius of the perturbation, a number or a schedule of the step.
      direction: what is perturbed along, see `sam`.
      norm: what has length rho, see `sam`.
      epsilon: e > 0, under every root.
      beta: decay of gbar.
      eta: of asam and fisher.
      sign: "descent" turns the perturbation round (for research).
      start: the first step with a perturbation; before, the oracle is `jax.value_and_grad`.
      groups: parts of the batch with a perturbation each (m-sharpness).
      layer_of: name of a leaf, "encoder/layer0/kernel", to the name of its layer.

    Raises:
      ValueError: a value out of range, an unknown name, or options that exclude each other.
      TypeError: a value of a wrong type.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> eps, guarded = llqr.sam(0.5).perturbation(jnp.zeros(2), jnp.array([3.0, 4.0]), 0.5)
      >>> [round(float(x), 3) for x in eps], int(guarded)
      ([0.3, 0.4], 0)
    """

    kind: Kind
    rho: Number | Schedule
    direction: Direction = "ema_grad"
    norm: Norm = "euclidean"
    epsilon: float = 1e-12
    beta: float = 0.9
    eta: float = 0.0
    sign: Sign = "ascent"
    start: int = 0
    groups: int = 1
    layer_of: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rho, jax.Array) and not isinstance(self.rho, Tracer):
            object.__setattr__(self, "rho", float(self.rho))  # hashable: static for jit
        check_range("rho", self.rho, low=0)
        legal = {"kind": Kind, "direction": Direction, "norm": Norm, "sign": Sign}
        for name, names in legal.items():
            check_choice(name, getattr(self, name), get_args(names))
        if self.scales_entries and (self.direction, self.norm) != ("ema_grad", "euclidean"):
            raise ValueError(
                f"{self.kind} has a perturbation of its own: direction={self.direction!r}, "
                f"norm={self.norm!r} must be 'ema_grad', 'euclidean'."
            )
        check_range("epsilon", self.epsilon, low=0, open_low=True)
        check_range("beta", self.beta, low=0, high=1)
        check_range("eta", self.eta, low=0)
        check_integer("start", self.start, low=0)
        check_integer("groups", self.groups, low=1)
        if self.groups > 1 and self.kind == "past_friendly":
            raise ValueError(
                f"groups={self.groups}: past_friendly_sam perturbs along earlier gradients, which "
                "are the same for every group; friendly_sam has a perturbation for each."
            )

    @property
    def scales_entries(self) -> bool:
        """Whether the perturbation has a formula of its own, entry by entry."""
        return self.kind in ("asam", "fisher")

    @property
    def averages(self) -> bool:
        """Whether there is a gbar."""
        return self.kind in ("friendly", "past_friendly")

    @property
    def passes(self) -> int:
        """Gradients that a perturbed step takes."""
        return 1 if self.kind == "past_friendly" else 2

    def __call__(
        self,
        function: Callable[..., Any],
        *,
        has_aux: bool = False,
        value_and_grad: ValueAndGrad = jax.value_and_grad,
        second_pass: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
        in_axes: Axes = 0,
        weight: Callable[..., Number] | None = None,
    ) -> "SharpnessOracle":
        """Return the oracle of a loss.

        Args:
          function: `(params, *args) -> loss`, or `(loss, aux)`; an `llqr.Objective` is one.
          has_aux: whether it returns auxiliary data (model state, outputs). They are taken
            from the perturbed pass; those of the clean pass are dropped, so that batch
            statistics are updated once.
          value_and_grad: how a gradient is taken: `llqr.microbatched(4)` for example.
          second_pass: `(args) -> args`, arguments of the perturbed pass made from those of the
            clean one; for another dropout key. None: the same.
          in_axes: with groups, where the examples are; see `llqr.microbatched`.
          weight: with groups, how much each counts; see `llqr.microbatched`.

        Raises:
          ValueError: `second_pass` where there is one pass, or `weight` without groups.
          TypeError: `function` is no function.
        """
        if not callable(function):
            raise TypeError(f"SAM needs a loss function, got {function!r}.")
        if second_pass is not None and self.passes == 1:
            raise ValueError(f"second_pass: {self.kind} has one pass.")
        if weight is not None and self.groups == 1:
            raise ValueError(
                "weight is of groups, and there is one; for micro-batches give it to "
                "llqr.microbatched."
            )
        in_axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes
        return SharpnessOracle(
            self, function, has_aux, value_and_grad, second_pass, in_axes, weight
        )

    def perturbation(
        self, params: Params, base: Params, rho: Number, precondition: Product | None = None
    ) -> tuple[Params, Int[Array, ""]]:
        """Return eps for a base vector w, and how many norms were guarded.

        A matrix norm sqrt(w.Pw) does not exist where P is not positive along w. There (for
        the layer, with layer norms) the perturbation is the Euclidean one along w.

        Args:
          params: theta.
          base: w, like params.
          rho: radius.
          precondition: the product with P; None where `direction` has no P in it.

        Returns:
          eps like params, in their dtypes, and the count: of layers, with layer norms.
        """
        leaves, treedef = jax.tree.flatten(params)
        names, kind = leaf_names(params), accurate_dtype(params)
        wide = lambda tree: [  # noqa: E731
            jnp.asarray(x, kind) for x in treedef.flatten_up_to(tree)
        ]
        w, rho, guarded = wide(base), jnp.asarray(rho, kind), jnp.zeros((), jnp.int32)
        if self.kind == "asam":
            eps = perturbation.adaptive(names, wide(params), w, rho, self.eta)
        elif self.kind == "fisher":
            eps = perturbation.in_fisher_metric(w, rho, self.eta)
        else:
            z = w
            if precondition is not None:
                z = wide(precondition(jax.tree.map(_cast, base, params)))
            e = max(self.epsilon, float(jnp.finfo(kind).tiny))
            if self.direction == "ema_direction":
                length = jnp.sqrt(vdot(z, z) + e)
                z = [x / length for x in z]
            by_layer = self.norm.startswith("layer")
            groups = perturbation.layers(names, self.layer_of) if by_layer else [[*range(len(w))]]
            matrix = self.norm.endswith("matrix_norm")
            eps, guarded = perturbation.of_length(groups, w, z, rho, matrix=matrix, epsilon=e)
        turn = 1 if self.sign == "ascent" else -1
        eps = [_cast(turn * e, x) for e, x in zip(eps, leaves, strict=True)]
        return jax.lax.stop_gradient(treedef.unflatten(eps)), guarded


@dataclass(frozen=True)
class SharpnessOracle:
    """Loss and SAM gradient of a function: `sam(...)(function)`.

    Attributes:
      method: how the perturbation is made.
      function: `(params, *args) -> loss`, or `(loss, aux)`.
      has_aux: whether it returns auxiliary data.
      value_and_grad: how a gradient is taken.
      second_pass: arguments of the clean pass to those of the perturbed one.
      in_axes: with groups, where the examples are.
      weight: with groups, how much each counts.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> oracle = llqr.friendly_sam(0.5, beta=0.5)(lambda w: 0.5 * jnp.sum(w**2))
      >>> w = jnp.array([3.0, 4.0])
      >>> state = oracle.init(w)
      >>> loss, grads, state = oracle.step(w, state)
      >>> [round(float(g), 3) for g in grads], int(state.info.evaluations)
      ([3.3, 4.4], 2)
    """

    method: Sharpness
    function: Callable[..., Any]
    has_aux: bool = False
    value_and_grad: ValueAndGrad = jax.value_and_grad
    second_pass: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
    in_axes: Axes = 0
    weight: Callable[..., Number] | None = None

    def init(self, params: Params) -> SharpnessState:
        """Return the state before the first step.

        Raises:
          TypeError: a leaf of `params` cannot be differentiated.
        """
        check_inexact(params)
        # Arrays of their own, so that a step can be donated all of them.
        zeros = lambda: jax.tree.map(  # noqa: E731
            lambda x: jnp.zeros_like(x, accurate_dtype(x)), params
        )
        counts = [jnp.zeros((), jnp.int32) for _ in range(4)]
        reals = [jnp.zeros((), jnp.float32) for _ in range(3)]
        return SharpnessState(
            counts[0],
            zeros() if self.method.averages else None,
            zeros() if self.method.kind == "past_friendly" else None,
            SharpnessInfo(*counts[1:], *reals),
        )

    def __call__(
        self, params: Params, *args: Any, precondition: Product | None = None, **kwargs: Any
    ) -> Any:
        """Return what `jax.value_and_grad(function, has_aux)` does, at the perturbed point.

        Args:
          params: theta.
          *args: of the function.
          precondition: the product with P, for the directions that have it.
          **kwargs: of the function.

        Raises:
          ValueError: the method has a state (a schedule, a delayed start, a moving average):
            use `step`.
        """
        method = self.method
        if method.averages or callable(method.rho) or method.start:
            raise ValueError(
                "this oracle has a state (a moving average, a schedule of rho or a delayed start): "
                "state = oracle.init(params), then value, grads, state = oracle.step(...)."
            )
        value, grads, _ = self.step(
            params, self.init(params), *args, precondition=precondition, **kwargs
        )
        return value, grads

    def step(
        self,
        params: Params,
        state: SharpnessState,
        *args: Any,
        precondition: Product | None = None,
        base: Params | None = None,
        active: bool | Bool[Array, ""] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Params, SharpnessState]:
        """Return value (with `has_aux`: value and aux), gradient and new state.

        Value, aux and gradient are those of the last pass, at theta + eps.

        Args:
          params: theta; the update is to be made from here.
          state: of the step before, or from `init`.
          *args: of the function.
          precondition: the product with P, for the directions that have it:
            `functools.partial(llqr.precondition, tx, opt_state)`.
          base: in place of the gradient as base vector w (for research); sam and friendly_sam.
          active: whether this step is perturbed. None follows `start`; a Python bool decides
            at trace time, so that no `cond` is compiled.
          **kwargs: of the function, the same in every pass and group.

        Raises:
          ValueError: `precondition` is missing, or would not be used; or `base` with a method
            that has none.
        """
        if kwargs:
            given = replace(self, function=partial(self.function, **kwargs))
            return given.step(
                params, state, *args, precondition=precondition, base=base, active=active
            )
        self._check(precondition, base)
        if active is None:
            active = True if not self.method.start else state.count >= self.method.start
        plain = lambda: self._plain(params, state, args)  # noqa: E731
        perturbed = lambda: self._perturbed(params, state, args, precondition, base)  # noqa: E731
        if isinstance(active, Tracer):
            return jax.lax.cond(active, perturbed, plain)
        return perturbed() if active else plain()

    def _check(self, precondition: Any, base: Any) -> None:
        method = self.method
        if method.direction == "ema_grad":
            if precondition is not None:
                raise ValueError(
                    f"precondition is given, and nothing uses it with {method.kind}, "
                    f"direction={method.direction!r}: choose ema_precond_grad or ema_direction of "
                    "sam, friendly_sam or past_friendly_sam, or leave it out."
                )
        elif precondition is None:
            raise ValueError(
                f"direction={method.direction!r} needs precondition=functools.partial("
                "llqr.precondition, tx, opt_state)."
            )
        if base is not None and method.kind not in ("sam", "friendly"):
            raise ValueError(f"base is for sam and friendly_sam, not for {method.kind}.")

    def _take(self, params: Params, args: tuple[Any, ...]) -> tuple[Array, Any, Params]:
        value, grads = self.value_and_grad(self.function, has_aux=self.has_aux)(params, *args)
        return (*value, grads) if self.has_aux else (value, (), grads)

    def _value(self, loss: Array, aux: Any) -> Any:
        return (loss, aux) if self.has_aux else loss

    def _plain(
        self, params: Params, state: SharpnessState, args: tuple[Any, ...]
    ) -> tuple[Any, Params, SharpnessState]:
        """One gradient at theta; buffers stay."""

        def part(*args: Any) -> tuple[Any, Any]:
            loss, aux, grads = self._take(params, args)
            return (loss, grads), aux

        (loss, grads), aux = self._over_groups(part, args)
        info = state.info._replace(
            evaluations=state.info.evaluations + 1,
            perturbation_norm=jnp.float32(0),
            clean_loss=loss.astype(jnp.float32),
            perturbed_loss=jnp.float32(jnp.inf),
        )
        return self._value(loss, aux), grads, state._replace(count=state.count + 1, info=info)

    def _perturbed(
        self,
        params: Params,
        state: SharpnessState,
        args: tuple[Any, ...],
        precondition: Product | None,
        base: Params | None,
    ) -> tuple[Any, Params, SharpnessState]:
        method = self.method
        rho = method.rho(state.count) if callable(method.rho) else method.rho
        single = method.kind == "past_friendly"
        second = self.second_pass or (lambda args: args)

        def part(*args: Any) -> tuple[Any, Any]:
            clean, gradient = jnp.float32(0), state.last
            if not single:
                clean, _, gradient = self._take(params, args)
            w = gradient if base is None else base
            if method.averages:
                w = jax.tree.map(jnp.subtract, widen(w), state.average)
            eps, guarded = method.perturbation(params, w, rho, precondition)
            there = optax.apply_updates(params, eps)
            loss, aux, grads = self._take(there, args if single else second(args))
            length = norm(widen(eps))
            kept = gradient if method.averages else ()
            return (loss, grads, kept, clean, length), (aux, guarded)

        (loss, grads, gradient, clean, length), (aux, guarded) = self._over_groups(part, args)
        old = state.info
        clean = jnp.float32(jnp.inf) if single else clean  # no pass went there
        info = SharpnessInfo(
            old.active + 1,
            old.evaluations + method.passes,
            old.guarded + jnp.sum(guarded, dtype=jnp.int32),
            *(x.astype(jnp.float32) for x in (length, clean, loss)),
        )
        average, last = state.average, widen(grads) if single else None
        if method.averages:
            average = self._averaged(state.average, gradient)
        new = SharpnessState(state.count + 1, average, last, info)
        return self._value(loss, aux), grads, new

    def _averaged(self, average: Params, gradient: Params) -> Params:
        """Gbar <- beta gbar + (1 - beta) g, of length 1 for ema_direction."""
        beta = self.method.beta
        new = jax.tree.map(lambda a, g: beta * a + (1 - beta) * g, average, widen(gradient))
        if self.method.direction != "ema_direction":
            return new
        length = norm(new)
        length = jnp.where(length > 0, length, 1.0)
        return jax.tree.map(lambda x: x / length, new)

    def _over_groups(self, part: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        return mean_over_parts(
            part, args, self.method.groups, in_axes=self.in_axes, weight=self.weight
        )


def _cast(x: Array, like: Array) -> Array:
    return jnp.asarray(x, jnp.result_type(like))
