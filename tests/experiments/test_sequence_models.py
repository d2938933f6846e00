"""Transformers: sizes, what may influence what, and the same products on both routes; float64."""

import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import llqr
from llqr import lqr
from llqr_experiments.errors import ConfigError
from llqr_experiments.models import MODELS, make, network
from llqr_experiments.models.transformer import Attention, sinusoidal_positions, sinusoids
from tests import oracle
from tests.experiments.sequences import (
    CASES,
    GPT,
    GPT_TIED,
    GROK,
    PAD,
    TRANSLATION,
    plain_text,
    plain_translation,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("float64")

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def mask(batch):
    return batch["y"] != PAD


def loss(z, batch):
    rows = -jnp.take_along_axis(z, batch["y"][:, None], 1)[:, 0]
    return jnp.sum(jnp.where(mask(batch), rows, 0.0)) / jnp.sum(mask(batch))


def objective_of(model):
    return llqr.Objective(model.as_forward(lambda batch: batch["x"]), loss, mask)


def random_like(params, seed=3):
    flat, unravel = ravel_pytree(params)
    return unravel(jnp.asarray(np.random.default_rng(seed).normal(size=flat.size)))


def close(a, b, tolerance=1e-10):
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 0, tolerance * scale), a, b)


# --- sizes --------------------------------------------------------------------------------------


@cache
def shapes(name, shape, classes, options):
    """The model with shapes in place of arrays; options are (key, value) pairs."""
    return nnx.eval_shape(lambda: make(name, shape, classes, seed=0, options=dict(options)))


def parameters(name, shape, classes, options):
    model = shapes(name, shape, classes, tuple(options.items()))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("expected", "name", "shape", "classes", "options"),
    [
        (458_849, "grok-transformer", (4,), 97, {}),
        # 155,186,257 as the papers have it, and twelve output projections of attention
        (155_186_257 + 12 * (768 * 768 + 768), "gpt2-small", (1024,), 50_257, {}),
        # GPT-2 small's known size, less the three biases that query, key and value go without
        (
            124_439_808 - 12 * 3 * 768, "gpt2-small", (1024,), 50_257,
            {"tied": True, "positions": "learned"},
        ),
        (39_469_056, "transformer-iwslt-de-en", (), 6632, {"source_vocabulary": 8848}),
    ],
)  # fmt: skip
def test_number_of_parameters_and_segments(expected, name, shape, classes, options):
    assert count(parameters(name, shape, classes, options)) == expected
    assert re.search(rf"\| {name}.* {expected:,} \|", DOCS.read_text())
    blocks = {"grok-transformer": 2, "gpt2-small": 12, "transformer-iwslt-de-en": 6 + 6}
    assert len(shapes(name, shape, classes, tuple(options.items())).groups) == blocks[name] + 2


@pytest.mark.parametrize(
    ("name", "classes", "options", "vocabularies"),
    [
        ("gpt2-small", 50_257, {}, {"left": [50_257], "right": [50_257]}),
        (
            "gpt2-small", 50_257, {"tied": True, "positions": "learned"},
            {"left": [50_257], "right": []},
        ),
        (
            "transformer-iwslt-de-en", 6632, {"source_vocabulary": 8848},
            {"left": [8848, 6632], "right": []},
        ),
    ],
)  # fmt: skip
def test_e_kfac_gpt_holds_no_square_of_a_vocabulary(name, classes, options, vocabularies):
    params = parameters(name, (1024,) if name == "gpt2-small" else (), classes, options)
    tx = llqr.llqr(optax.sgd(0.1), structure="e-kfac-gpt", max_dim=10**6)
    rows = {row.view: row for row in llqr.describe(tx, params).rows if max(row.view) > 6000}
    width = 768 if name == "gpt2-small" else 512
    views = [(n, width) for n in vocabularies["left"]]
    views += [(width, n) for n in vocabularies["right"]]
    biases = [(n,) for n in vocabularies["right"]]
    assert set(rows) == {*views, *biases}
    for view in views:
        (n,) = (side for side in view if side != width)
        assert rows[view].stored == n + width**2 + n * width


# --- parts against other code -------------------------------------------------------------------


def test_attention_is_that_of_jax():
    rng = np.random.default_rng(0)
    part = Attention(6, 2, bias=True, rngs=nnx.Rngs(0))
    drawn = lambda x: jnp.asarray(rng.normal(size=x.shape))  # noqa: E731
    nnx.update(part, jax.tree.map(drawn, nnx.state(part, nnx.Param)))
    x, memory = jnp.asarray(rng.normal(size=(2, 3, 6))), jnp.asarray(rng.normal(size=(2, 5, 6)))
    keep = jnp.asarray(rng.random((2, 2, 3, 5)) < 0.6).at[..., 0].set(True)
    split = lambda y: y.reshape(*y.shape[:-1], 2, 3)  # noqa: E731

    @jax.jit
    def both(x, memory, keep):
        mixed = jax.nn.dot_product_attention(
            split(part.query(x)), split(part.key(memory)), split(part.value(memory)), mask=keep
        )
        return part(x, keep, memory), part.out(mixed.reshape(2, 3, 6))

    ours, theirs = both(x, memory, keep)
    close(ours, theirs, 1e-6)  # their softmax is float32
    # A query that may see nothing is finite and gets nothing.
    blind = both(x, memory, keep.at[0, :, 1].set(False))[0]
    np.testing.assert_array_equal(blind[0, 1], nnx.state(part, nnx.Param)["out"]["bias"][...])


def test_positions_are_the_formulas():
    width, length = 6, 9
    t = np.arange(length)
    for i in range(width // 2):
        angle = t / 10_000 ** (2 * i / width)
        added = sinusoidal_positions(jnp.zeros((2, length, width)))
        np.testing.assert_allclose(added[1, :, 2 * i], np.sin(angle), atol=1e-12)
        np.testing.assert_allclose(added[1, :, 2 * i + 1], np.cos(angle), atol=1e-12)
        angle = t / 10_000 ** (i / (width // 2 - 1))
        blocks = sinusoids(jnp.asarray(t), width, jnp.float64)
        np.testing.assert_allclose(blocks[:, i], np.sin(angle), atol=1e-12)
        np.testing.assert_allclose(blocks[:, width // 2 + i], np.cos(angle), atol=1e-12)
    half = sinusoids(jnp.arange(1000), width, jnp.bfloat16)
    wide = sinusoids(jnp.arange(1000), width, jnp.float64)
    assert float(jnp.max(jnp.abs(half - wide))) < 0.01  # the index itself is not rounded


@each
def test_outputs_are_those_of_numpy(case):
    net = case.build()
    expected = plain_translation(case) if case is TRANSLATION else plain_text(case)
    found = jax.jit(net.model)(net.params, case.batch()["x"])
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_initial_values():
    net = network(
        make("transformer-iwslt-de-en", (), 300, seed=0,
             options={"width": 64, "mlp": 96, "depth": 1, "source_vocabulary": 200})
    )  # fmt: skip
    owned = [net.params[name] for name in net.model.names if name in net.params]
    tables = [p["embedding"] for p in owned if "embedding" in p]
    assert [len(table) for table in tables] == [200, 300]
    for table in tables:
        assert not table[PAD].any()
        np.testing.assert_allclose(jnp.std(table), 64**-0.5, rtol=0.05)
    attention = next(p for p in owned if "query" in p)
    for name, gain in (("query", 0.5**0.5), ("key", 0.5**0.5), ("value", 0.5**0.5), ("out", 1)):
        bound = gain * np.sqrt(6 / 128)
        found = float(jnp.max(jnp.abs(attention[name]["kernel"])))
        assert 0.95 * bound < found <= bound
        assert not attention[name]["bias"].any()


# --- what may influence what --------------------------------------------------------------------


def without_the_head(net):
    def run(params, state):
        for segment in net.model.segments[:-1]:
            state = segment(segment.control(params), state)
        return state

    return run


def before_the_head(case, inputs):
    """The last state with a place for each token, [B, T, ...]."""
    net = case.build()
    if case is not GROK:
        size = jax.tree.leaves(inputs)[0].shape[0]
        return jax.jit(net.model)(net.params, inputs).reshape(size, -1, case.classes)
    return jax.jit(without_the_head(net))(net.params, inputs)


def with_target(case, tokens, inputs):
    return {**inputs, "target_in": tokens} if case is TRANSLATION else tokens


@each
def test_later_tokens_change_nothing_before_them(case):
    inputs = case.batch()["x"]
    tokens = inputs["target_in"] if case is TRANSLATION else inputs
    original = before_the_head(case, inputs)
    for t in range(1, tokens.shape[1]):
        changed = tokens.at[0, t].set((tokens[0, t] + 2) % 7)
        found = before_the_head(case, with_target(case, changed, inputs))
        np.testing.assert_array_equal(found[0, :t], original[0, :t])
        assert jnp.all(jnp.any(found[0, t:] != original[0, t:], -1))


@each
def test_examples_of_a_batch_never_mix(case):
    net, inputs = case.build(), case.batch()["x"]
    run = jax.jit(net.model)
    shape = (2, -1, case.classes)
    original = run(net.params, inputs).reshape(shape)
    changed = jax.tree.map(lambda x: x.at[1].set(jnp.roll(x[1], 1)), inputs)
    found = run(net.params, changed).reshape(shape)
    np.testing.assert_array_equal(found[0], original[0])
    assert not jnp.array_equal(found[1], original[1])


def padded(case):
    """The batch of TRANSLATION with more pads, on both sides, and a sentence of pads alone.

    Returns the batch and which rows of it are those of the original.
    """
    batch = case.batch()
    wide = lambda x, left, right: jnp.pad(  # noqa: E731
        x, ((0, 1), (left, right)), constant_values=PAD
    )
    x = {
        "source": wide(batch["x"]["source"], 2, 1),
        "target_in": wide(batch["x"]["target_in"], 1, 2),
    }
    y = wide(batch["y"].reshape(2, 3), 1, 2)
    rows = np.arange(18).reshape(3, 6)[:2, 1:4].reshape(-1)
    return {"x": x, "y": y.reshape(-1)}, rows


@pytest.mark.parametrize(
    "metric", [None, *(pytest.param(m, marks=pytest.mark.slow) for m in ("ngd", "newton"))]
)
def test_padding_changes_nothing(metric):
    """Neither the outputs, the loss and its gradient, nor a product with the curvature."""
    net = TRANSLATION.build()
    u = random_like(net.params)

    @jax.jit
    def everything(batch):
        if metric is None:
            outputs = net.model(net.params, batch["x"])
            return outputs, loss(outputs, batch)
        model = llqr.linearize(objective_of(net.model).bind(batch), net.params, metric)
        return model.outputs, model.loss, model.gradient, model.product(u)

    batch, (more, rows) = TRANSLATION.batch(), padded(TRANSLATION)
    outputs, *others = everything(batch)
    wide, *wide_others = everything(more)
    real = np.asarray(mask(batch))
    close(wide[rows[real]], outputs[real])
    assert jnp.all(jnp.isfinite(wide))
    for found, expected in zip(wide_others, others, strict=True):
        close(found, expected)
    if metric is None:
        return
    # Pads of the source are embedded, but what they are makes no difference.
    (source,) = (p for p in others[1].values() if jax.tree.leaves(p)[0].shape == (8, 4))
    assert not source["embedding"][PAD].any()


# --- curvature ----------------------------------------------------------------------------------


ROUTES = [
    pytest.param(
        case, metric, id=f"{metric}-{case.name}",
        marks=[] if (case, metric) == (GPT_TIED, "newton") else pytest.mark.slow,
    )
    for case in CASES for metric in ("ngd", "newton")
]  # fmt: skip


@pytest.mark.parametrize(("case", "metric"), ROUTES)
def test_both_routes_give_the_products_of_jax(case, metric):
    net, batch, damping = case.build(), case.batch(), 0.1
    u = random_like(net.params)

    @jax.jit
    def routes(params, u):
        fused = llqr.linearize(objective_of(net.model).bind(batch), params, metric, damping=damping)
        problem = lqr.linearize(
            net.model, params, batch["x"], loss=lambda z: loss(z, batch), metric=metric,
            damping=damping, mask=mask(batch),
        )  # fmt: skip
        layerwise = lqr.cost_and_gradient(problem, u)
        value, gradient = oracle.value_and_gradient(fused, u)
        return (value, gradient), layerwise

    @jax.jit
    def dense(params, u):
        outputs = lambda p: net.model(p, batch["x"])  # noqa: E731
        whole = lambda p: loss(outputs(p), batch)  # noqa: E731
        g = jax.grad(whole)(params)
        if metric == "newton":
            cu = jax.jvp(jax.grad(whole), (params,), (u,))[1]
        else:
            z, dz = jax.jvp(outputs, (params,), (u,))
            s = jax.nn.softmax(z)
            fisher = s * dz - s * jnp.sum(s * dz, -1, keepdims=True)
            cu = jax.vjp(outputs, params)[1](jnp.where(mask(batch)[:, None], fisher, 0.0))[0]
        dot = lambda a, b: jnp.vdot(ravel_pytree(a)[0], ravel_pytree(b)[0])  # noqa: E731
        slope = jax.tree.map(lambda g, c, u: g + c + damping * u, g, cu, u)
        return dot(g, u) + (dot(u, cu) + damping * dot(u, u)) / 2, slope

    fused, layerwise = routes(net.params, u)
    expected = dense(net.params, u)
    close(fused, layerwise)
    close(fused, expected)


@pytest.mark.parametrize(
    "case",
    [GPT_TIED, pytest.param(TRANSLATION, marks=pytest.mark.slow)],
    ids=["gpt2", "translation"],
)
def test_a_tied_matrix_counts_once(case):
    """One matrix in the tree; its gradient is the sum over a twin with a matrix for each use."""
    net, batch = case.build(), case.batch()
    tables = [name for name, p in net.params.items() if p.keys() == {"embedding"}]
    shapes = sorted(net.params[name]["embedding"].shape for name in tables)
    other = (8, 4) if case is TRANSLATION else (4, 4)  # the source's; learned positions
    assert shapes == sorted([(7, 4), other])
    assert net.model.segments[-1].shared == {
        name for name in tables if net.params[name]["embedding"].shape == (7, 4)
    }

    def twin(embedding, output):
        state = without_the_head(net)(embedding, batch["x"])
        head = net.model.segments[-1]
        return loss(head(head.control(output), state), batch)

    ours = jax.jit(jax.grad(objective_of(net.model)))(net.params, batch)
    first, second = jax.jit(jax.grad(twin, (0, 1)))(net.params, net.params)
    close(ours, jax.tree.map(jnp.add, first, second))
    (table,) = net.model.segments[-1].shared
    assert first[table]["embedding"].any()
    assert second[table]["embedding"].any()


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [GPT, TRANSLATION], ids=lambda case: case.name)
def test_training_without_dropout_is_inference(case):
    options = {**case.options, "dropout": 0.0}
    net = network(make(case.model, case.shape, case.classes, seed=1, options=options))
    inputs = case.batch()["x"]
    outputs, statistics = jax.jit(net.training)(net.params, {}, jax.random.key(0), inputs)
    close(outputs, jax.jit(net.model.bind({}))(net.params, inputs), 1e-6)
    assert statistics == {}


@pytest.mark.parametrize("case", [GPT, TRANSLATION], ids=lambda case: case.name)
def test_dropout_follows_its_key(case):
    net, inputs = case.build(), case.batch()["x"]
    run = jax.jit(lambda key: net.training(net.params, {}, key, inputs)[0])
    first, again, other = (run(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, jax.jit(net.model)(net.params, inputs))


def test_dropout_is_on_the_weights_of_attention():
    part = Attention(4, 2, dropout=1.0, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 4))
    assert not part(x, jnp.ones((3, 3), bool)).any()  # out's bias is zero
    part.eval()
    assert part(x, jnp.ones((3, 3), bool)).any()


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("grok-transformer", (4,), {"heads": 3}, "heads=3 must divide width=128"),
        ("gpt2-small", (4,), {"heads": 0}, "heads=0 must divide width=768"),
        ("transformer-iwslt-de-en", (), {"heads": 7}, "heads=7 must divide width=512"),
        ("transformer-iwslt-de-en", (), {"width": 2}, "width=2 must be even"),
        ("transformer-iwslt-de-en", (), {"depth": 0}, "depth=0"),
        ("gpt2-small", (4,), {"width": 7, "heads": 1}, "width=7 must be even"),
        ("gpt2-small", (4,), {"positions": "learnt"}, "did you mean 'learned'"),
        ("gpt2-small", (8, 8, 1), {}, r"shape \(length,\), got \(8, 8, 1\)"),
        ("grok-transformer", (6,), {}, "6 tokens are longer than max_length=5"),
        ("grok-transformer", (4,), {"dropout": 0.1}, "grok-transformer has no such option"),
    ],
)
def test_what_cannot_be_built(name, shape, options, message):
    with pytest.raises(ConfigError, match=message):
        make(name, shape, 7, seed=0, options=options)


def test_inputs_that_do_not_fit():
    net = GPT_TIED.build()
    with pytest.raises(ValueError, match="5 tokens is longer than the 4 learned positions"):
        net.model(net.params, jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match="tokens must be integers, got float64"):
        net.model(net.params, jnp.zeros((1, 4)))


@pytest.mark.parametrize("name", ["grok-transformer", "gpt2-small", "transformer-iwslt-de-en"])
def test_the_small_siblings(name):
    assert count(parameters(name, (4,), 7, MODELS[name].small)) < 10_000
