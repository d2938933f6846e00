"""The family by name: each function returns how its perturbation is made."""

from collections.abc import Callable

from llqr.typing import Number, Schedule

from .oracle import Sharpness
from .perturbation import Direction, Norm, Sign


def sam(
    rho: Number | Schedule = 0.1,
    *,
    direction: Direction = "ema_grad",
    norm: Norm = "euclidean",
    epsilon: float = 1e-12,
    sign: Sign = "ascent",
    start: int = 0,
    groups: int = 1,
    layer_of: Callable[[str], str] | None = None,
) -> Sharpness:
    """Sharpness-aware minimization: w is the gradient at theta. Two gradients a step.

    Args:
      rho: radius of the perturbation, >= 0; a number or a schedule of the step.
      direction: z. "ema_grad": w. "ema_precond_grad": P w. "ema_direction": P w of length 1
        (and gbar, where there is one, is normalised after its update).
      norm: what has length rho. "euclidean": |z|. "matrix_norm": sqrt(w.z), for z = P w the
        length of eps in the metric P^-1. "layer_euclidean", "layer_matrix_norm": the same in
        every layer, with rho / sqrt(number of layers) each.
      epsilon: e > 0, added under every root.
      sign: "descent" turns the perturbation round.
      start: the first perturbed step.
      groups: parts of the batch that are perturbed each on its own (m-sharpness, of batch /
        groups examples). Part i holds the examples i, i + groups, ..., whatever the devices.
        Auxiliary data then have the parts on a new first axis.
      layer_of: a leaf's name, "encoder/layer0/kernel", to its layer's, for the layer norms;
        None: the first part, "encoder". Where all parameters are under one key, such as
        Linen's "params", that is one layer.

    Returns:
      The method; `sam(...)(loss)` is the oracle.

    Raises:
      ValueError: a value out of range, or an unknown name (the nearest is given).

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> def loss(w):
      ...     return 0.5 * jnp.sum(w**2)
      >>> value, grad = llqr.sam(0.5)(loss)(jnp.array([3.0, 4.0]))
      >>> [round(float(g), 3) for g in grad]  # the gradient at w (1 + 0.5 / |w|)
      [3.3, 4.4]

    References:
      Foret et al., Sharpness-Aware Minimization, arXiv 2010.01412.
    """
    return Sharpness(
        kind="sam", rho=rho, direction=direction, norm=norm, epsilon=epsilon, sign=sign,
        start=start, groups=groups, layer_of=layer_of,
    )  # fmt: skip


def friendly_sam(
    rho: Number | Schedule = 0.1,
    *,
    beta: float = 0.9,
    direction: Direction = "ema_grad",
    norm: Norm = "euclidean",
    epsilon: float = 1e-12,
    sign: Sign = "ascent",
    start: int = 0,
    groups: int = 1,
    layer_of: Callable[[str], str] | None = None,
) -> Sharpness:
    """Friendly SAM: w = g - gbar, the part of the gradient that is the batch's own.

    gbar <- beta gbar + (1 - beta) g after the step, from zero, without bias correction. Two
    gradients a step.

    Args:
      rho: radius, see `sam`; likewise what is not listed here.
      beta: decay of gbar, in [0, 1].
      direction: z.
      norm: what has length rho.
      epsilon: under every root.
      sign: of the perturbation.
      start: the first perturbed step.
      groups: parts of the batch.
      layer_of: name of a leaf's layer.

    Raises:
      ValueError: a value out of range, or an unknown name.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> oracle = llqr.friendly_sam(0.5)(lambda w: 0.5 * jnp.sum(w**2))
      >>> w = jnp.array([3.0, 4.0])
      >>> loss, grads, state = oracle.step(w, oracle.init(w))
      >>> [round(float(g), 3) for g in state.average]  # gbar after one step
      [0.3, 0.4]

    References:
      Li et al., Friendly Sharpness-Aware Minimization, arXiv 2403.12350.
    """
    return Sharpness(
        kind="friendly", rho=rho, beta=beta, direction=direction, norm=norm, epsilon=epsilon,
        sign=sign, start=start, groups=groups, layer_of=layer_of,
    )  # fmt: skip


def past_friendly_sam(
    rho: Number | Schedule = 0.1,
    *,
    beta: float = 0.9,
    direction: Direction = "ema_grad",
    norm: Norm = "euclidean",
    epsilon: float = 1e-12,
    start: int = 0,
    layer_of: Callable[[str], str] | None = None,
) -> Sharpness:
    """Friendly SAM from earlier gradients: w = g_last - gbar. One gradient a step.

    After the step, gbar <- beta gbar + (1 - beta) g_last, and g_last is the gradient just
    taken, at theta + eps. The first step has no perturbation.

    Args:
      rho: radius, see `sam`; likewise what is not listed here.
      beta: decay of gbar, in [0, 1].
      direction: z.
      norm: what has length rho.
      epsilon: under every root.
      start: the first perturbed step.
      layer_of: name of a leaf's layer.

    Raises:
      ValueError: a value out of range, or an unknown name.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> oracle = llqr.past_friendly_sam(0.5)(lambda w: 0.5 * jnp.sum(w**2))
      >>> w = jnp.array([3.0, 4.0])
      >>> loss, grads, state = oracle.step(w, oracle.init(w))
      >>> grads.tolist()
      [3.0, 4.0]
      >>> loss, grads, state = oracle.step(w, state)
      >>> [round(float(g), 3) for g in grads], int(state.info.evaluations)
      ([3.3, 4.4], 2)
    """
    return Sharpness(
        kind="past_friendly", rho=rho, beta=beta, direction=direction, norm=norm,
        epsilon=epsilon, start=start, layer_of=layer_of,
    )  # fmt: skip


def asam(
    rho: Number | Schedule = 0.1, *, eta: float = 0.01, start: int = 0, groups: int = 1
) -> Sharpness:
    """Adaptive SAM: eps = rho T T g / |T g| with T = |theta| + eta; T = 1 for leaves named bias.

    Args:
      rho: radius, in units of the parameters' size.
      eta: >= 0, keeps small parameters movable.
      start: the first perturbed step.
      groups: parts of the batch, see `sam`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> value, grad = llqr.asam(0.5, eta=0.0)(lambda w: jnp.sum(w))(jnp.array([3.0, 4.0]))
      >>> round(float(value), 3)  # 7 + 0.5 |w|
      9.5

    References:
      Kwon et al., ASAM, arXiv 2102.11600.
    """
    return Sharpness(kind="asam", rho=rho, eta=eta, start=start, groups=groups)


def fisher_sam(
    rho: Number | Schedule = 0.1, *, eta: float = 0.1, start: int = 0, groups: int = 1
) -> Sharpness:
    """Fisher SAM: eps = rho f / sqrt(g.f) with f = g / (g^2 + eta), entry by entry.

    Args:
      rho: radius in the diagonal Fisher metric.
      eta: >= 0, added to the squared gradient.
      start: the first perturbed step.
      groups: parts of the batch, see `sam`.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> value, grad = llqr.fisher_sam(0.5, eta=0.0)(lambda w: jnp.sum(w))(jnp.zeros(4))
      >>> round(float(value), 3)  # f = 1: eps = 0.5 / sqrt(4) for each entry
      1.0

    References:
      Kim et al., Fisher SAM, arXiv 2206.04920.
    """
    return Sharpness(kind="fisher", rho=rho, eta=eta, start=start, groups=groups)
