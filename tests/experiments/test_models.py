"""Models of images: sizes, twins, dropout, how they start, and what cannot be built."""

import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llqr.structures import plan as plans
from llqr.structures.rules import rule_table
from llqr_experiments import models
from llqr_experiments.errors import ConfigError
from llqr_experiments.models import pyramidnet
from llqr_experiments.models.staged import Staged
from tests.experiments import models_oracle
from tests.experiments.model_cases import CASES, CLASSES, layout, parameters_of

MNIST, CIFAR, IMAGENET = (28, 28, 1), (32, 32, 3), (224, 224, 3)
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


# --- sizes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A model at full size; the numbers are those of the papers' implementation."""

    name: str
    shape: tuple[int, int, int]
    parameters: dict[int, int]  # by number of classes
    stages: tuple[int, int]  # controlled, passive
    segments: int
    options: tuple = ()

    def __str__(self):
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options)])


SIZES = [
    Size("mlp", MNIST, {10: 111_810}, (3, 3), 3),
    Size("mlp-legacy", MNIST, {10: 111_810}, (3, 0), 3),
    Size("resnet-18", CIFAR, {10: 11_173_962, 100: 11_220_132}, (41, 17), 18),
    Size("resnet-50", IMAGENET, {1000: 25_557_032}, (107, 50), 50),
    Size("vgg16-bn", CIFAR, {10: 15_253_578, 100: 15_299_748}, (29, 24), 8),
    Size("wide-resnet-28-10", CIFAR, {10: 36_479_194, 100: 36_536_884}, (54, 52), 14),
    Size("wide-resnet-28-10", CIFAR, {10: 46_160_474, 100: 46_218_164}, (66, 64), 17,
         (("units_per_group", 5),)),
    Size("pyramidnet-110", CIFAR, {10: 18_323_787, 100: 18_426_837}, (256, 150), 38),
    Size("vit-ti-16", CIFAR, {10: 5_362_762, 100: 5_380_132}, (65, 53), 14),
    Size("vit-s-16", CIFAR, {10: 21_342_346, 100: 21_376_996}, (65, 53), 14),
]  # fmt: skip


@cache
def full(name, shape, options=()):
    """A model of 10 classes without arrays; the parameters of 10 classes, and of one more."""
    model = layout(name, shape, 10, **dict(options))
    *_, kernel = (part.kernel for _, part, _ in model.stages() if hasattr(part, "kernel"))
    return model, sum(x.size for x in jax.tree.leaves(parameters_of(model))), len(kernel) + 1


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size):
    model, of_ten, of_one = full(size.name, size.shape, size.options)
    found = {classes: of_ten + (classes - 10) * of_one for classes in size.parameters}
    assert found == size.parameters
    controlled = len(parameters_of(model))
    assert (controlled, len(model.plan) - controlled) == size.stages
    assert len(model.groups) == size.segments


@pytest.mark.parametrize(("units", "expected"), [(4, 36_479_194), (5, 46_160_474)])
def test_wide_resnet_by_formula(units, expected):
    """3x3 kernels w_in w_out 9, norms 2 w, 1x1 projections, a classifier."""
    total, fan_in = 9 * 3 * 16, 16
    for w in (160, 320, 640):
        total += 2 * fan_in + 9 * fan_in * w + 2 * w + 9 * w * w + fan_in * w
        total += (units - 1) * 2 * (2 * w + 9 * w * w)
        fan_in = w
    assert total + 2 * 640 + 641 * 10 == expected


def test_the_table_of_the_docs():
    rows = re.findall(r"^\| `(.*?)` \|(.*)\|$", DOCS.read_text(), re.MULTILINE)
    assert {name.split()[0] for name, _ in rows} >= {size.name for size in SIZES}
    for name, row in rows:
        name, *options = name.split()
        options = tuple((k, int(v)) for k, v in (option.split("=") for option in options))
        shape, classes, parameters, stages, segments, own = (c.strip() for c in row.split("|"))
        shape = tuple(int(n) for n in shape.split("x"))
        model, of_ten, of_one = full(name, shape, options)
        assert int(parameters.replace(",", "")) == of_ten + (int(classes) - 10) * of_one
        controlled = len(parameters_of(model))
        assert stages == f"{len(model.plan)} ({controlled} + {len(model.plan) - controlled})"
        assert int(segments) == len(model.groups)
        assert re.findall(r"`(\w+)`", own) == models.MODELS[name].options


def test_patches_of_images_of_imagenet():
    for shape, classes in ((IMAGENET, 10), (CIFAR, 1000)):
        model = layout("vit-ti-16", shape, classes, depth=1)
        assert model.layers_0.kernel.shape == (16, 16, 3, 192)


@pytest.mark.parametrize("name", [n for n, m in models.MODELS.items() if m.takes == "images"])
def test_small_siblings_take_larger_images(name):
    model = layout(name, CIFAR, 10, **models.MODELS[name].small)
    out = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, *CIFAR)))
    assert out.shape == (2, 10)


# --- twins ---------------------------------------------------------------------------------------


def test_every_model_has_a_case():
    names = {case.name for case in CASES}
    assert names == {size.name for size in SIZES}
    assert names <= set(models.MODELS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twins(case):
    """Inference is the oracle and `model.eval()`; training, the same with its own statistics."""
    with jax.enable_x64(True):
        model = case.make(**({"dropout": 0.0} if case.has_dropout else {}))
        network = models.network(model)
        params, statistics = network.params, network.statistics
        x = case.batch()["x"]
        inference = jax.jit(lambda p, s, x: network.model.bind(s)(p, x))
        found = inference(params, statistics, x)

        weights = models_oracle.Weights(params, statistics)
        np.testing.assert_allclose(found, jax.jit(partial(case.oracle, weights))(x), atol=1e-10)
        weights.done()

        model.eval()
        whole = nnx.jit(lambda model, x: model(x))(model, x)
        np.testing.assert_allclose(found, whole, atol=1e-12)

        outputs, fresh = jax.jit(network.training)(params, statistics, jax.random.key(0), x)
        assert jax.tree.structure(fresh) == jax.tree.structure(statistics)
        if case.momentum is not None:
            m = case.momentum
            of_batch = jax.tree.map(lambda new, old: (new - m * old) / (1 - m), fresh, statistics)
            assert np.abs(outputs - found).max() > 1e-3
            # The small variances of deep layers magnify rounding.
            found = inference(params, of_batch, x)
        np.testing.assert_allclose(outputs, found, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twins_share_the_layout(case):
    model = layout(case.name, (8, 8, 1), CLASSES, **models.MODELS[case.name].small)

    def shapes():
        kinds = (nnx.Param, nnx.BatchStat)
        return [jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model, kind))) for kind in kinds]

    model.train()
    params, statistics = shapes()
    model.eval()
    assert shapes() == [params, statistics]
    assert set(params) >= set(statistics)
    assert all(re.fullmatch(r"layers_\d+", key) for key in params)


def test_batch_norm_against_the_formula():
    """Outputs, running statistics and the gradient through the statistics of the batch."""
    with jax.enable_x64(True):
        rngs = nnx.Rngs(0)
        norm = nnx.BatchNorm(5, momentum=0.9, epsilon=1e-5, rngs=rngs)
        network = models.network(Staged([[nnx.Linear(4, 5, rngs=rngs), norm, nnx.relu]]))
        params = jax.tree.map(lambda x: x.astype(float) + 0.1, network.params)
        old = {"layers_1": {"mean": jnp.full(5, 0.5), "var": jnp.full(5, 2.0)}}
        x = jax.random.normal(jax.random.key(0), (7, 4))

        def written(params):
            h = x @ params["layers_0"]["kernel"] + params["layers_0"]["bias"]
            mean = h.sum(0) / 7
            var = ((h - mean) ** 2).sum(0) / 7
            scale, bias = params["layers_1"]["scale"], params["layers_1"]["bias"]
            y = models_oracle.relu((h - mean) / jnp.sqrt(var + 1e-5) * scale + bias)
            new = {"mean": 0.45 + 0.1 * mean, "var": 1.8 + 0.1 * var}
            return (y**3).sum(), (y, {"layers_1": new})

        def ours(params):
            y, new = network.training(params, old, jax.random.key(0), x)
            return (y**3).sum(), (y, new)

        both = [jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (written, ours)]
        expected, found = both
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected)


# --- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("vgg16-bn", "vit-ti-16")], ids=str)
def test_dropout_follows_the_key(case):
    network = models.network(case.make(dropout=0.3))
    run = jax.jit(partial(network.training, network.params, network.statistics))
    x = case.batch()["x"]
    first, again, other = (run(jax.random.key(k), x)[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_dropouts_are_independent_and_keep_the_mean():
    rngs = nnx.Rngs(0)
    drops = [nnx.Dropout(0.3, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)]
    network = models.network(Staged([drops]))
    y, _ = network.training({}, {}, jax.random.key(0), jnp.ones((200, 200)))
    kept = np.asarray(y) > 0
    np.testing.assert_allclose(np.asarray(y)[kept], 1 / 0.7**2, rtol=1e-6)
    # 40,000 draws: five standard errors of the share of those that both layers keep
    assert abs(kept.mean() - 0.49) < 5 * np.sqrt(0.49 * 0.51 / kept.size)
    np.testing.assert_array_equal(network.model.bind({})({}, jnp.ones((2, 3))), np.ones((2, 3)))


def test_attention_drops_weights_of_each_head_and_example():
    """Its output is linear in them, so its mean over keys is that of inference."""
    model = next(case for case in CASES if case.name == "vit-ti-16").make(width=4)
    network = models.network(Staged([[model.layers_6]]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 4)), float).repeat(2, axis=0)
    exact = np.asarray(network.model.bind({})(network.params, x))
    keys = jax.random.split(jax.random.key(0), 4000)
    run = jax.jit(jax.vmap(lambda key: network.training(network.params, {}, key, x)[0]))
    drawn = np.asarray(run(keys))
    error = drawn.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(drawn.mean(0) - exact) < 5 * error)
    assert np.abs(drawn[:, 0] - drawn[:, 1]).max() > 1e-2  # the same example twice


# --- how they start -----------------------------------------------------------------------------


def test_vit_starts_as_published():
    model = models.make(
        "vit-ti-16", CIFAR, 10, seed=0, options={"width": 64, "depth": 1, "heads": 2}
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    zeros = ("layers_2/class_token", "layers_17/kernel", "layers_17/bias", "layers_0/bias")
    for path in zeros:
        stage, leaf = path.split("/")
        assert not np.any(params[stage][leaf])
    np.testing.assert_allclose(np.std(params["layers_3"]["positions"]), 0.02, rtol=0.1)
    bounds = {"query": 128, "key": 128, "value": 128, "out": 128}  # fan in + fan out
    uniform = [(params["layers_6"][name]["kernel"], fans) for name, fans in bounds.items()]
    uniform += [(params[f"layers_{i}"]["kernel"], 64 + 256) for i in (9, 12)]
    for kernel, fans in uniform:
        bound = np.sqrt(6 / fans)
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.05)
    assert not any(np.any(params["layers_6"][name]["bias"]) for name in bounds)
    for i in (9, 12):
        np.testing.assert_allclose(np.std(params[f"layers_{i}"]["bias"]), 1e-6, rtol=0.3)


def test_convolutions_start_lecun_normal():
    model = models.make("vgg16-bn", CIFAR, 10, seed=0, options={"blocks": [2], "hidden": [8]})
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    np.testing.assert_allclose(np.std(params["layers_3"]["kernel"]), 1 / np.sqrt(9 * 64), rtol=0.05)
    assert not np.any(params["layers_3"]["bias"])
    assert np.all(params["layers_4"]["scale"] == 1)


def test_an_odd_side_is_averaged_over_what_there_is():
    np.testing.assert_array_equal(pyramidnet._halve(jnp.ones((1, 5, 5, 2))), np.ones((1, 3, 3, 2)))
    model = layout("pyramidnet-110", (7, 9, 1), 3, alpha=6, depth=11)
    out = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, 7, 9, 1)))
    assert out.shape == (2, 3)


def test_leaves_of_attention_are_seen_as_matrices():
    """Heads side by side: [d, heads dh] for query, key and value, [heads dh, d] for the output."""
    model = layout("vit-ti-16", CIFAR, 10, depth=1)
    plan = plans.make_plan(parameters_of(model), rule_table("e-kfac"), 10_000)
    shapes = {block.names[0]: (block.structure.name, block.shape) for block in plan}
    for leaf in ("query", "key", "value", "out"):
        assert shapes[f"layers_6/{leaf}/kernel"] == ("e-kfac", (192, 192))
        assert shapes[f"layers_6/{leaf}/bias"][0] == "diagonal"
    assert shapes["layers_2/class_token"] == ("diagonal", (1, 1, 192))
    assert shapes["layers_3/positions"] == ("e-kfac", (65, 192))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("vgg16-bn", (28, 28, 1), {}, r"28x28 pixels: its 5 blocks.*must be >= 32"),
        ("vgg16-bn", CIFAR, {"blocks": [2, 0]}, r"every number of blocks must be >= 1, got 0"),
        ("vit-ti-16", (28, 30, 1), {}, r"28x30 pixels.*patch=4: choose one of 1, 2\.$"),
        ("vit-ti-16", CIFAR, {"patch": 5}, r"patch=5: choose one of 1, 2, 4, 8, 16, 32"),
        ("vit-s-16", CIFAR, {"heads": 5}, r"width=384 must be a multiple of heads=5.*choose 385"),
        ("vit-s-16", CIFAR, {"dropout": 1.5}, r"dropout must lie in \[0, 1\], got 1.5"),
        ("vit-s-16", CIFAR, {"depth": 0}, r"depth must be >= 1, got 0"),
        ("pyramidnet-110", CIFAR, {"depth": 100}, r"depth=100 must be 9 n \+ 2.*92 or 101"),
        ("pyramidnet-110", CIFAR, {"depth": 2}, r"depth must be >= 11, got 2"),
        ("pyramidnet-110", CIFAR, {"alpha": -1}, r"alpha must lie in \[0, inf\), got -1"),
        ("wide-resnet-28-10", CIFAR, {"units_per_group": 0}, r"units_per_group must be >= 1"),
        ("wide-resnet-28-10", (64,), {}, r"shape \(64,\): it needs images"),
        ("pyramidnet-110", CIFAR, {"width": 3}, r"width=3: pyramidnet-110 has no such option"),
        ("vit-ti", CIFAR, {}, r"unknown architecture 'vit-ti': did you mean 'vit-ti-16'"),
    ],
)
def test_sizes_that_cannot_be_built(name, shape, options, message):
    with pytest.raises(ConfigError, match=message):
        models.make(name, shape, 10, seed=0, options=options)
