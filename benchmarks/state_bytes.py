"""What P costs in memory on each device, computed from shapes alone: nothing is allocated.

    uv run python benchmarks/state_bytes.py           # the table of docs/scale.md

The devices are along `fsdp`, and lie as in the runner (`llqr_experiments.layout`). P of the
published refits; streaming adds the momentum, second moments and the sides' statistics, which its
rows count too.
"""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh
from reporting import show

import llqr
from llqr_experiments.layout import AXES, Layout

GIBIBYTE = 2**30
Shapes = dict[str, tuple[int, ...]]


def gpt2() -> Shapes:
    """GPT-2 small, its output matrix tied."""
    layer = {
        "query/kernel": (768, 768), "key/kernel": (768, 768), "value/kernel": (768, 768),
        "out/kernel": (768, 768), "up/kernel": (768, 3072), "down/kernel": (3072, 768),
        "norm_1/scale": (768,), "norm_2/scale": (768,), "up/bias": (3072,), "down/bias": (768,),
    }  # fmt: skip
    return {"embedding": (50_257, 768), "positions": (1024, 768), **layers(layer, 12)}


def vit_b() -> Shapes:
    """ViT-B/16 for images of 224 x 224 and 1,000 classes."""
    layer = {
        "query/kernel": (768, 768), "key/kernel": (768, 768), "value/kernel": (768, 768),
        "out/kernel": (768, 768), "up/kernel": (768, 3072), "down/kernel": (3072, 768),
        "norm_1/scale": (768,), "norm_2/scale": (768,), "up/bias": (3072,), "down/bias": (768,),
    }  # fmt: skip
    head = {"patches/kernel": (768, 768), "positions": (197, 768), "head/kernel": (768, 1000)}
    return {**head, **layers(layer, 12)}


def llama_1b() -> Shapes:
    """Llama 3.2 1B: 16 layers of width 2,048, 8 heads for keys and values, tied output."""
    layer = {
        "query/kernel": (2048, 2048), "key/kernel": (2048, 512), "value/kernel": (2048, 512),
        "out/kernel": (2048, 2048), "gate/kernel": (2048, 8192), "up/kernel": (2048, 8192),
        "down/kernel": (8192, 2048), "norm_1/scale": (2048,), "norm_2/scale": (2048,),
    }  # fmt: skip
    return {"embedding": (128_256, 2048), **layers(layer, 16)}


def layers(one: Shapes, count: int) -> Shapes:
    """The same layer several times."""
    return {f"{i}/{name}": shape for i in range(count) for name, shape in one.items()}


MODELS = {"GPT-2 small": gpt2, "ViT-B/16": vit_b, "Llama 1B": llama_1b}
WAYS: dict[str, dict[str, Any]] = {
    "diagonal": {"structure": "diagonal"},
    "e-kfac": {"structure": "e-kfac"},
    "e-kfac, blocks of 1,024": {"structure": "e-kfac", "block_size": 1024},
    "streaming e-kfac": {"structure": "e-kfac", "refit": llqr.Streaming()},
    "streaming, blocks of 1,024": {
        "structure": "e-kfac", "block_size": 1024, "refit": llqr.Streaming(),
    },
}  # fmt: skip


def rows(names: list[str], devices: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield a row for each model and way: GiB on each device."""
    for name in names:
        for way, options in WAYS.items():
            row: dict[str, Any] = {"model": name, "P": way}
            for count in devices:
                row[f"{count} device{'s' if count > 1 else ''} (GiB)"] = held(
                    MODELS[name](), options, count
                )
            yield row


def held(shapes: Shapes, options: dict[str, Any], count: int) -> float:
    """Return the GiB of the optimizer's state on each of some devices."""
    layout = Layout(AbstractMesh((1, count, 1), AXES))
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.parameter(shape))
        for name, shape in shapes.items()
    }
    tx = llqr.llqr(optax.sgd(0.1), metric="ngd", **options)
    state, onto = jax.eval_shape(tx.init, params), llqr.state_shardings(tx, params)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(onto), strict=True)
    size = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)
    return round(size / GIBIBYTE, 3)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Bytes of P on each device.")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    given = parser.parse_args()
    show("optimizer's state on each device", list(rows(given.models, (1, 8, 64))))


if __name__ == "__main__":
    main()
