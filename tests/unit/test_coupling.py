"""Where a batch can be cut between examples: what tracing finds of models of many kinds."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr import coupling
from llqr.errors import LayoutWarning

N, D = 8, 4
W = {"a": np.eye(D), "b": np.ones((D, D)) / D}


def mean_square(z: Any, batch: Any) -> Any:
    del batch
    return sum(jnp.mean(x**2) for x in jax.tree.leaves(z))


def data(n: int = N) -> dict[str, Any]:
    x = jnp.arange(n * D, dtype=float).reshape(n, D) / (n * D)
    return {"x": x, "y": jnp.arange(n) % D, "i": (jnp.arange(n) + 1) % n}


def per_head(p: Any, b: Any) -> Any:
    h = (b["x"] @ p["a"]).reshape(len(b["x"]), 2, D // 2)
    weights = jax.nn.softmax(jnp.einsum("bhd,bgd->bhg", h, h))
    return jnp.einsum("bhg,bgd->bhd", weights, h).reshape(len(b["x"]), D)


def looped(p: Any, b: Any) -> Any:
    def body(_: Any, h: Any) -> Any:
        return jnp.tanh(h @ p["a"])

    return jax.lax.fori_loop(0, 3, body, b["x"])


APART = {
    "matrices": lambda p, b: jnp.tanh(b["x"] @ p["a"]) @ p["b"],
    "one example at a time": lambda p, b: jax.vmap(lambda x: x @ p["a"])(b["x"]),
    "a map": lambda p, b: jax.lax.map(lambda x: jnp.tanh(x @ p["a"]), b["x"]),
    "a table": lambda p, b: p["a"][b["y"]] @ p["b"],
    "a choice in each row": lambda p, b: jnp.take_along_axis(b["x"] @ p["a"], b["y"][:, None], 1),
    "one of a few, by number": lambda p, b: jax.nn.one_hot(b["y"], D, dtype=float) @ p["a"],
    "a norm of each row": lambda p, b: b["x"] / (1 + jnp.sum(b["x"] ** 2, -1, keepdims=True)),
    "attention in an example": per_head,
    "rows in one line": lambda p, b: (
        (b["x"].reshape(-1, 2) @ jnp.ones((2, 3)))[:, None] @ jnp.ones((3, 1))),
    "a convolution": lambda p, b: jax.lax.conv_general_dilated(
        b["x"].reshape(-1, 2, 2, 1), jnp.ones((2, 2, 1, 3)), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC")),
    "pooling": lambda p, b: jax.lax.reduce_window(
        b["x"].reshape(-1, 2, 2), 0.0, jax.lax.add, (1, 2, 2), (1, 2, 2), "VALID"),
    "a checkpoint and a loop over layers": lambda p, b: jax.lax.scan(
        jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), b["x"],
        jnp.stack([p["a"], p["b"]]))[0],
    "a loop": looped,
    "a branch": lambda p, b: jax.lax.cond(p["a"][0, 0] > 0, jnp.tanh, jnp.sin, b["x"] @ p["b"]),
    "a rule of its own": lambda p, b: jax.nn.relu(jax.nn.gelu(b["x"] @ p["a"])),
    "sorted in an example": lambda p, b: jnp.sort(jnp.cumsum(b["x"] @ p["a"], 1), 1),
    "a value set in each": lambda p, b: b["x"].at[:, 0].set(1.0) @ p["a"],
    "two outputs": lambda p, b: {"z": b["x"] @ p["a"], "w": b["x"][:, :1]},
    "noise": lambda p, b: b["x"] @ p["a"] * jax.random.normal(jax.random.key(0), (len(b["x"]), D)),
    "stacked in an example": lambda p, b: jax.vmap(
        lambda x: jnp.stack([x @ p["a"], x]))(b["x"]).sum(1),
    "rolled in an example": lambda p, b: jax.vmap(lambda x: jnp.roll(x, 1))(b["x"] @ p["a"]),
    "a transform in an example": lambda p, b: jnp.abs(jnp.fft.fft(b["x"] @ p["a"], axis=1)),
    "parameters alone": lambda p, b: b["x"] @ p["a"] + jnp.sum(p["b"], 0),
}  # fmt: skip

TOGETHER = {
    "edges": lambda p, b: jax.ops.segment_sum(
        (b["x"] @ p["a"])[b["i"]], b["y"], num_segments=len(b["x"])),
    "neighbours": lambda p, b: (b["x"] @ p["a"])[b["i"]],
    "time first": lambda p, b: jax.lax.scan(
        lambda h, x: (jnp.tanh(h @ p["a"] + x),) * 2, jnp.zeros(D), b["x"])[1],
    "statistics of the batch": lambda p, b: (b["x"] - b["x"].mean(0)) @ p["a"],
    "every pair": lambda p, b: (b["x"] @ p["a"]) @ b["x"].T,
    "distances": lambda p, b: jnp.sum((b["x"][:, None] - b["x"][None] @ p["a"]) ** 2, -1),
    "attention over all": lambda p, b: jax.nn.softmax(b["x"] @ b["x"].T) @ b["x"] @ p["a"],
    "a shift": lambda p, b: jnp.roll(b["x"], 1, axis=0) @ p["a"],
    "differences": lambda p, b: (b["x"][1:] - b["x"][:-1]) @ p["a"],
    "the first": lambda p, b: b["x"][0] @ p["a"],
    "sums so far": lambda p, b: jnp.cumsum(b["x"] @ p["a"], 0),
    "in order": lambda p, b: jnp.sort(b["x"] @ p["a"], 0),
    "a convolution over all": lambda p, b: (
        jnp.convolve(b["x"][:, 0], jnp.ones(3), "same")[:, None] @ p["a"][:1]),
    "windows": lambda p, b: jax.lax.reduce_window(
        b["x"] @ p["a"], 0.0, jax.lax.add, (2, 1), (1, 1), "SAME"),
    "in a call": lambda p, b: jax.jit(lambda x: x - x.max(0))(b["x"] @ p["a"]),
    "in a checkpoint": lambda p, b: jax.checkpoint(lambda x: x - x.mean(0))(b["x"] @ p["a"]),
    "in a loop": lambda p, b: jax.lax.fori_loop(
        0, 2, lambda _, h: jnp.tanh(h @ p["a"]) - h.mean(0), b["x"]),
    "in a branch": lambda p, b: jax.lax.cond(
        p["a"][0, 0] > 0, lambda x: x - x.sum(0), jnp.sin, b["x"] @ p["b"]),
    "added into one": lambda p, b: jnp.zeros((D, D)).at[b["y"]].add(b["x"]) @ p["a"],
    "backwards": lambda p, b: b["x"][::-1] @ p["a"],
    "every second": lambda p, b: b["x"][::2] @ p["a"],
    "halves": lambda p, b: jnp.split(b["x"] @ p["a"], 2)[0],
    "a solve": lambda p, b: jnp.linalg.solve(b["x"][:, :1] * jnp.eye(len(b["x"])), b["x"]) @ p["a"],
}  # fmt: skip


def bound(forward: Any, batch: Any = None, **options: Any) -> llqr.BoundObjective:
    return llqr.Objective(forward, mean_square, **options).bind(data() if batch is None else batch)


@pytest.mark.parametrize("name", APART)
def test_examples_that_do_not_meet_can_be_cut(name: str) -> None:
    """And outputs of a part are those of the whole: the oracle of what tracing says."""
    objective = bound(APART[name])
    assert coupling.interaction(objective, W) is None
    if name != "noise":
        part, whole = objective.part(0.5, 1).outputs(W), objective.outputs(W)
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            rows = y.reshape(N, -1, *y.shape[1:])[1::2].reshape(x.shape)
            np.testing.assert_allclose(x, rows, atol=1e-6)


@pytest.mark.parametrize("name", TOGETHER)
def test_examples_that_meet_are_found(name: str) -> None:
    assert "interact" in str(coupling.interaction(bound(TOGETHER[name]), W))


@pytest.mark.parametrize("name", TOGETHER)
def test_what_meets_is_seen_whole_and_said(name: str) -> None:
    objective = bound(TOGETHER[name])
    with pytest.warns(LayoutWarning, match=r"see all of the batch.*batch_axes=.*probe_share=1\.0"):
        found = coupling.part(objective, W, 0.25, 0)
    assert found is objective


def test_who_says_where_examples_are_is_believed() -> None:
    for axes in ({"x": 0, "y": 0, "i": 0}, 0, None):
        objective = bound(TOGETHER["neighbours"], batch_axes=lambda b, axes=axes: axes)
        assert coupling.interaction(objective, W) is None
        part = coupling.part(objective, W, 0.25, 0)
        assert len(part.batch["x"]) == (N if axes is None else N // 4)


def test_first_is_as_where_nothing_is_said() -> None:
    batch = (data(), {"mean": jnp.zeros((1, D))})
    objective = bound(
        lambda p, b: (b[0]["x"] - b[1]["mean"]) @ p["a"],
        batch,
        batch_axes=lambda b: ("first", None),
    )
    part = coupling.part(objective, W, 0.25, 0)
    assert part.batch[0]["x"].shape == (2, D)
    assert part.batch[1]["mean"].shape == (1, D)
    objective = bound(
        lambda p, b: TOGETHER["neighbours"](p, b[0]), batch, batch_axes=lambda b: ("first", None)
    )
    assert coupling.interaction(objective, W) is not None


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"i": np.arange(2 * N)}, "8, 16 entries"),
        ({"m": np.ones(N)}, r"fails on a part \(TypeError"),
    ],
)
def test_sizes_that_differ_or_agree_by_chance(more: Any, why: str) -> None:
    def forward(p: Any, b: Any) -> Any:
        return b["x"] @ p["a"] + (jnp.ones((1, N)) @ b["m"][:, None] if "m" in b else 0)

    with pytest.warns(LayoutWarning, match=why):
        assert len(coupling.part(bound(forward, data() | more), W, 0.25, 0).batch["x"]) == N


def test_a_loss_that_fails_on_a_part_is_found_too() -> None:
    labels = jnp.zeros(N)
    objective = llqr.Objective(lambda p, b: b @ p["a"], lambda z, b: jnp.mean(z[:, 0] * labels))
    with pytest.warns(LayoutWarning, match="fails on a part"):
        coupling.part(objective.bind(data()["x"]), W, 0.25, 0)


def test_what_fails_on_the_whole_batch_is_told_as_it_is() -> None:
    def forward(p: Any, b: Any) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), warnings.catch_warnings():
        coupling.part(bound(forward), W, 0.25, 0)


@pytest.mark.parametrize("size", [2, N])
def test_a_legacy_key_is_no_pair_of_examples(size: int) -> None:
    batch = data(size) | {"key": jax.random.PRNGKey(3)}

    def forward(p: Any, b: Any) -> Any:
        keep = jax.random.normal(b["key"], b["x"].shape)
        return (b["x"] * keep) @ p["a"]

    part = coupling.part(bound(forward, batch), W, 0.5, 0)
    assert len(part.batch["x"]) == size // 2
    assert part.batch["key"].shape == (2,)
    loss = llqr.Objective(forward, mean_square)
    llqr.microbatched(2)(loss)(W, batch)


def test_chunks_of_what_meets_are_refused() -> None:
    objective = bound(TOGETHER["neighbours"])
    tx = llqr.llqr(
        optax.sgd(0.1), structure="diagonal", metric="gaussian", route=llqr.Route(chunk_size=4),
        refit=llqr.Refit(every=None, steps=2),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot be cut between examples.*gather.*batch_axes"):
        llqr.refresh(tx, tx.init(W), W, objective)


def test_an_objective_says_what_microbatches_are() -> None:
    objective = llqr.Objective(
        lambda p, b: (b[0] - b[1]) @ p["a"], mean_square, batch_axes=lambda b: (0, None)
    )
    batch = (data()["x"], jnp.ones((N, D))[:1])
    value, grad = llqr.microbatched(4)(objective)(W, batch)
    expected, other = jax.value_and_grad(objective)(W, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad["a"], other["a"], rtol=1e-5)


def test_it_is_said_inside_jit_and_while_training() -> None:
    objective = llqr.Objective(TOGETHER["time first"], mean_square)
    tx = llqr.streaming(0.1, metric="gaussian")
    batch = data()
    step = jax.jit(
        lambda s, p: tx.update(jax.grad(objective)(p, batch), s, p, objective=objective.bind(batch))
    )
    with pytest.warns(LayoutWarning, match="scan along"):
        step(tx.init(W), W)


def test_a_batch_that_cannot_be_hashed_is_traced_all_the_same() -> None:
    class Unhashable:
        __hash__ = None  # pyright: ignore

        def __call__(self, p: Any, b: Any) -> Any:
            return b["x"] @ p["a"]

    assert coupling.interaction(bound(Unhashable()), W) is None
    assert (
        coupling.interaction(bound(partial(TOGETHER["shift"] if False else APART["matrices"])), W)
        is None
    )


def _chain(rng: np.random.Generator) -> tuple[Any, bool]:
    """A model of some operations in a row, and whether one of them makes examples meet."""
    apart = [
        lambda h, b: jnp.tanh(h @ jnp.asarray(W["b"]) + h),
        lambda h, b: h.reshape(len(h) * 2, D // 2).reshape(len(h), D),
        lambda h, b: jnp.swapaxes(jnp.swapaxes(h, 0, 1) * 2, 0, 1),
        lambda h, b: jax.vmap(lambda x: x / (1 + jnp.sum(x**2)))(h),
        lambda h, b: h[:, ::-1],
        lambda h, b: jnp.concatenate([h[:, 1:], h[:, :1]], 1),
        lambda h, b: jnp.where(b["y"][:, None] > 1, h, 2 * h),
        lambda h, b: jax.lax.scan(
            lambda c, w: (jnp.sin(c @ w), None), h, jnp.stack([W["a"]] * 2))[0],
        lambda h, b: jnp.einsum("ij,ik->ijk", h, h).sum(1),
        lambda h, b: jnp.cumsum(h, 1),
    ]  # fmt: skip
    together = [
        lambda h, b: h - h.mean(0),
        lambda h, b: h[b["i"]],
        lambda h, b: jnp.roll(h, 1, 0),
        lambda h, b: jnp.cumsum(h, 0),
        lambda h, b: jax.nn.softmax(h @ h.T) @ h,
        lambda h, b: jax.lax.scan(lambda c, x: (c + x, c + x), jnp.zeros(D), h)[1],
        lambda h, b: h[::-1],
        lambda h, b: h / jnp.linalg.norm(h),
        lambda h, b: jax.ops.segment_sum(h, b["i"], num_segments=len(h)),
    ]
    meets = bool(rng.integers(2))
    chosen = [apart[i] for i in rng.integers(len(apart), size=4)]
    if meets:
        chosen.insert(int(rng.integers(5)), together[rng.integers(len(together))])

    def forward(p: Any, b: Any) -> Any:
        h = b["x"] @ p["a"]
        for run in chosen:
            h = run(h, b)
        return h

    return forward, meets


@pytest.mark.parametrize("seed", range(40))
def test_no_chain_of_operations_is_cut_in_silence(seed: int) -> None:
    forward, meets = _chain(np.random.default_rng(seed))
    objective = bound(forward)
    found = coupling.interaction(objective, W)
    assert (found is not None) == meets
    if found is None:
        part, whole = objective.part(0.5, 1).outputs(W), objective.outputs(W)
        np.testing.assert_allclose(part, whole[1::2], atol=1e-9)
