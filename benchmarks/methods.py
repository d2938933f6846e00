"""What the study compares: optimizers with learning rate 1, and when their refits are due.

A method is made by `build(**options)`; its updates are multiplied by the scheduled rate in the
loop, so that every method has the same schedule. `kinds` says which keywords, all Python values,
`update` takes at a step: the loop compiles one step for each set of them. To add a method, add a
`Method` to `METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import optax
import soap

import llqr

Kind = tuple[tuple[str, bool], ...]
PLAIN: Kind = (("refresh", False),)
REFRESH: Kind = (("refresh", True),)
FREQUENCY = 10
"""Steps from one refit to the next of SOAP and of streaming methods."""
WARMUP = 20
"""First steps of a streaming method, with a refit in each."""


@dataclass(frozen=True)
class Outside:
    """A refit that is no part of the step, on a batch of its own."""

    every: int
    batch: int
    products: float  # gradient evaluations of that batch


@dataclass(frozen=True, eq=False)
class Method:
    """One optimizer.

    Attributes:
      name: how it is called in tables.
      build: options -> transformation.
      options: of `build`, written into the results.
      rate: the first to try.
      kinds: step -> keywords of `update`.
      probe: gradient evaluations that a refit inside a step adds to it.
      outside: refits between steps, if there are any.
      equal_work: whether it makes fewer steps, so that its gradient evaluations are no more than
        others' steps.
    """

    name: str
    build: Callable[..., optax.GradientTransformation]
    rate: float
    options: dict[str, Any] = field(default_factory=dict)
    kinds: Callable[[int], Kind] = lambda step: PLAIN
    probe: float = 0.0
    outside: Outside | None = None
    equal_work: bool = False

    def steps(self, total: int) -> int:
        """Return how many steps it makes where others make `total`."""
        if not self.equal_work:
            return total
        work, step = 0.0, 0
        while (work := work + self.work(self.kinds(step))) <= total:
            step += 1
        return step

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Return the transformation."""
        return optax.with_extra_args_support(self.build(**self.options))

    def work(self, kind: Kind) -> float:
        """Return the gradient evaluations of a step of a kind, outside refits apart."""
        return 1 + self.probe * dict(kind).get("refresh", False)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its results, for the file of results."""
        kinds = [dict(self.kinds(step)) for step in range(2 * WARMUP)]
        refits = [i for i, kind in enumerate(kinds) if any(kind.values())]
        outside = None if self.outside is None else vars(self.outside)
        return {"options": self.options, "refits of the first 40 steps": refits, "outside": outside}


def every_tenth(step: int) -> Kind:
    """A refit at each `FREQUENCY`-th step, the first included."""
    return PLAIN if step % FREQUENCY else REFRESH


def streamed(step: int) -> Kind:
    """A refit at each of the first steps and at each `FREQUENCY`-th."""
    return REFRESH if step < WARMUP else every_tenth(step)


def _muon(**options: Any) -> optax.GradientTransformation:
    """Muon on every kernel, Adam on embeddings and vectors.

    The rows of a convolution's matrix are all of its axes but the last. Embeddings go to Adam, as
    Muon's authors advise.
    """

    def dimensions(params: Any) -> Any:
        def one(path: Any, x: Any) -> Any:
            if x.ndim < 2 or "embedding" in jax.tree_util.keystr(path):
                return None
            return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

        return jax.tree.map_with_path(one, params)

    return optax.contrib.muon(1.0, muon_weight_dimension_numbers=dimensions, **options)


def _soap(**options: Any) -> optax.GradientTransformation:
    return optax.chain(soap.scale_by_soap(**options), optax.scale(-1.0))


def _llqr(refit: dict[str, Any], momentum: float | None, **options: Any) -> Any:
    """LLQR in front of SGD, refitted from outside."""
    return llqr.llqr(optax.sgd(1.0, momentum=momentum), refit=llqr.Refit(**refit), **options)


def _streaming(structure: str, **options: Any) -> Any:
    """LLQR with streaming refits, all else at its defaults."""
    return llqr.llqr(optax.sgd(1.0), structure=structure, refit=llqr.Streaming(), **options)


_PROBE = {
    "every": 100,
    "steps": 50,
    "probe": "fisher",
    "probes": 2,
    "solver": "relative",
    "learning_rate": 0.1,
    "anneal": True,
    "clip_norm": None,
}
_UNIT = {
    "divergence_reduction": "unit",
    "damping": 1e-3,
    "graft": "global",
    "identity_scaling": 100.0,
}
"""_PROBE and _UNIT are `method=probe` of the runner, with a refit every 100 steps."""

_POWER_STEPS = 8  # products that estimate the largest eigenvalue
_PROBE_PRODUCTS = 1 + _POWER_STEPS + 2 * _PROBE["steps"] * _PROBE["probes"]


def _streaming_method(
    structure: str, suffix: str = "", more: dict[str, Any] | None = None, **changes: Any
) -> Method:
    options = {"structure": structure, **(more or {})}
    return Method(f"LLQR streaming {structure}{suffix}", _streaming, 1.6e-2, options, streamed, 1.0,
                  **changes)  # fmt: skip


METHODS = (
    Method("SGD", partial(optax.sgd, 1.0), 0.2),
    Method("momentum", partial(optax.sgd, 1.0), 0.05, {"momentum": 0.9}),
    Method("Adam", partial(optax.adam, 1.0), 2e-3),
    Method("AdamW", partial(optax.adamw, 1.0), 2e-3, {"weight_decay": 1e-2}),
    Method("Muon", _muon, 1e-2),
    Method("Muon, rms 0.2", _muon, 4e-3, {"consistent_rms": 0.2}),
    Method("SOAP", _soap, 4e-3, kinds=every_tenth),
    Method("LLQR published e-kfac", _llqr, 0.4,
           {"structure": "e-kfac", "momentum": None, "refit": {"every": 100}},
           outside=Outside(100, 64, 51)),
    Method("LLQR probe kfac, momentum", _llqr, 0.05,
           {"structure": "kfac", "momentum": 0.9, "refit": _PROBE, **_UNIT},
           outside=Outside(100, 256, _PROBE_PRODUCTS)),
    _streaming_method("diagonal"),
    _streaming_method("kfac"),
    _streaming_method("e-kfac"),
    _streaming_method("e-kfac", ", equal gradients", equal_work=True),
    _streaming_method("e-kfac", ", blocks of 256", {"block_size": 256}),
)  # fmt: skip


def is_ours(name: str) -> bool:
    """Whether a method is LLQR, by its name."""
    return name.startswith("LLQR")
