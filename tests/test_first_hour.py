"""Six models as their authors write them: ours ends no higher than AdamW, but for a tolerance."""

from collections.abc import Iterator

import jax
import pytest

from benchmarks import first_hour

pytestmark = pytest.mark.slow

# Model -> steps, rate of AdamW, rate of ours, and how many times AdamW's loss ours may be: with
# probes, with gradients. Of two seeds each, measured: 0.93 to 0.97 (unet), 0.003 to 0.38 (gnn),
# 0.10 to 0.36 (pinn), 0.93 to 0.96 (transformer), 0.86 to 0.97 (flow); bag, where AdamW is ahead,
# 1.04 to 1.17.
CASES: dict[str, tuple[int, float, float, float, float]] = {
    "unet": (40, 1e-2, 1e-2, 1.05, 1.05),
    "gnn": (60, 1e-2, 1e-2, 1.0, 1.0),
    "pinn": (100, 1e-2, 1e-2, 0.6, 0.6),
    "transformer": (40, 3e-3, 1e-2, 1.0, 1.0),
    "flow": (150, 3e-3, 1e-2, 1.05, 1.05),
    "bag": (150, 1e-2, 1e-2, 1.3, 1.3),
}


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """Strangers run float32, with JAX's own promotion of dtypes."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.filterwarnings("ignore::llqr.errors.LayoutWarning")
@pytest.mark.parametrize("name", CASES)
def test_not_worse_than_adamw(name: str) -> None:
    steps, usual, own, *tolerances = CASES[name]
    model = first_hour.MODELS[name]
    adamw = first_hour.train(model, first_hour.Method("AdamW", usual), steps)
    for method, tolerance in zip(("probes", "gradients"), tolerances, strict=True):
        ours = first_hour.train(model, first_hour.Method(method, own), steps)
        assert ours.end < ours.losses[0]
        assert ours.end < tolerance * adamw.end, (method, ours.end, adamw.end)
