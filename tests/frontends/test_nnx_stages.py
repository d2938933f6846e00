"""NNX modules as a staged model: the module's own output, and the fused route's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import llqr
import llqr.integrations.nnx as llqr_nnx
from llqr import lqr


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 6, rngs=rngs, param_dtype=float)
        self.norm = nnx.BatchNorm(6, rngs=rngs, param_dtype=float)
        self.out = nnx.Linear(6, 3, rngs=rngs, param_dtype=float)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.norm(self.hidden(x)))))


def loss(z, batch):
    return optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()


def test_stages_of_modules_equal_the_model():
    with jax.enable_x64(True):
        net = Net(nnx.Rngs(0))
        net.eval()
        model, params, statistics = llqr_nnx.stages(
            [("hidden", net.hidden), ("norm", net.norm), ("relu", nnx.relu), ("drop", net.drop),
             ("out", net.out)]
        )  # fmt: skip
        staged = model.bind(statistics)
        assert sorted(params) == ["hidden", "norm", "out"]
        batch = {"x": jax.random.normal(jax.random.key(1), (5, 4)), "y": jnp.arange(5) % 3}
        np.testing.assert_allclose(staged(params, batch["x"]), net(batch["x"]), rtol=1e-12)
        problem = lqr.linearize(
            staged, params, batch["x"], loss=lambda z: loss(z, batch), damping=0.1
        )
        step = lqr.solve(problem)

        objective = llqr_nnx.objective(net, lambda net, batch: net(batch["x"]), loss)
        fused = llqr.linearize(
            llqr_nnx.bind(objective, net, batch),
            nnx.as_pure(nnx.state(net, nnx.Param)),
            damping=0.1,
        )
        tree = jax.tree.map(jnp.zeros_like, fused.gradient)
        for name, leaves in step.items():
            for key in leaves:
                tree[name][key] = leaves[key]
        residual = jax.tree.map(jnp.add, fused.product(tree), fused.gradient)
        for leaf in jax.tree.leaves(residual):
            np.testing.assert_allclose(leaf, 0, atol=1e-7)  # statistics are float32 in NNX
