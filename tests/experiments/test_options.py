"""The table of options: what each becomes is there, legal where the option is, and read."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import llqr
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.config.row import accepted, become, rows
from llqr_experiments.data import translation
from llqr_experiments.data.kinds import KINDS
from llqr_experiments.models.decoding import Rules
from llqr_experiments.run.step import Recipe

HORIZON = build.Horizon(100.0, 2.0)
ROOM = Path(__file__).parents[2] / "src" / "llqr_experiments"


def names(owner):
    return set(inspect.signature(owner).parameters)


OWNERS = {
    "refit": names(llqr.Refit),
    "route": names(llqr.Route),
    "streaming": names(llqr.Streaming),
    "llqr": names(llqr.llqr),
    "sam": names(llqr.Sharpness),
    "asam": names(llqr.asam),
    "fisher_sam": names(llqr.fisher_sam),
    "recipe": names(Recipe),
    "rules": names(Rules),
    "bucketing": names(translation.Bucketing),
}
ROWS = [(name, row) for name, row, _ in rows(Config) if row.metadata.get("becomes")]


def test_what_an_option_becomes_is_there():
    for name, row in ROWS:
        for path in row.metadata["becomes"]:
            owner, _, field = path.partition(".")
            assert field in OWNERS[owner], f"{name} becomes {path}"


def test_every_field_of_a_refit_and_of_its_route_is_an_option():
    config = Config()
    assert set(become(config, "refit")) == OWNERS["refit"]
    assert set(become(config, "route")) == OWNERS["route"] - {"axis_name"}  # of pmap, shard_map
    assert set(become(config, "streaming")) == OWNERS["streaming"]


@pytest.mark.parametrize(
    ("name", "row"),
    [x for x in ROWS if any(p.startswith("refit.") for p in x[1].metadata["becomes"])],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_range_of_an_option_is_the_librarys(name, row):
    (field,) = [p.partition(".")[2] for p in row.metadata["becomes"] if p.startswith("refit.")]
    rules = row.metadata
    for value in (rules[rule] for rule in ("low", "high") if rule in rules):
        if rules.get("off") != value:  # what is off does not get there
            llqr.Refit(**{field: value})
    outside = [rules[rule] + sign for rule, sign in (("low", -1), ("high", 1)) if rule in rules]
    for value in outside + ([rules["above"]] if "above" in rules else []):
        with pytest.raises(ValueError, match=field):
            llqr.Refit(**{field: value})


def test_what_is_no_plain_copy():
    def around(group, value):
        return f"{group} around {value}"

    given = dataclasses.replace(
        Config(), momentum=0.3, precond_clip_norm=0.0, update_preconditioner_until=0,
        batch_solve_precond=False, llqr_operator_mode="lowmem_exact_k", rng_seed=7,
        llqr_batch_update_mode="chunked_lqr_segment", llqr_batch_update_chunk_size=8,
        llqr_second_order_mode="sample_separable_exact", llqr_second_order_chunk_size=4,
        precond_on_update=True, on_nonfinite="skip", start_sam_after_step=None,
    )  # fmt: skip
    refit = become(given, "refit", around)
    assert refit["learning_rate"] == "precond_lr_scheduler around 0.001"
    assert refit["every"] == "precond_update_scheduler around 1000"
    assert refit["ema_decay"] == "ema_scheduler around 0.0"
    assert refit["momentum"] == 0.3, "of the main optimizer, where it has none of its own"
    assert refit["clip_norm"] is None
    assert refit["until"] is None
    assert refit["per_example"] is True
    assert refit["seed"] == 7
    assert become(dataclasses.replace(given, precond_momentum=0.0), "refit")["momentum"] == 0.0
    route = become(given, "route")
    assert route["memory"] == "curvature_recomputed"
    assert route["chunk_size"] == 4, "the smaller of two"
    assert not route["layerwise"]
    assert become(given, "llqr")["precondition"] == "update"
    assert become(given, "recipe") == {
        "microbatches": 1, "normalize": False, "skip": True, "seed": 7
    }  # fmt: skip
    assert become(given, "sam", around)["rho"] == "perturbation_rho_scheduler around 0.1"
    assert become(given, "sam")["start"] == 0


def test_a_schedule_is_evaluated_at_the_step_itself():
    """The boundary is at 0.03 epochs of 100 steps."""
    config = dataclasses.replace(
        Config(),
        precond_lr=2.0,
        precond_lr_scheduler={
            "name": "piecewise_constant",
            "boundaries": [[0.03, 0.5]],
        },
    )
    rate = build.refit_options(config, HORIZON).learning_rate
    assert callable(rate)
    assert [float(rate(t)) for t in (0, 2, 3, 4)] == [2.0, 2.0, 1.0, 1.0]


def test_a_method_gets_what_it_has():
    given = {"rho": 0.1, "eta": 0.2, "beta": 0.3}
    assert accepted(llqr.asam, given) == {"rho": 0.1, "eta": 0.2}
    assert accepted(llqr.friendly_sam, given) == {"rho": 0.1, "beta": 0.3}


ONE_VALUE = {"block_structure_init", "translation_eval.remove_bpe"}
"""Legal with the one value that the papers' commands give, and read by nothing."""

SIZES_SAY_IT = {"llqr_batch_update_mode", "llqr_second_order_mode"}
"""Which of them, if any, is used follows from the sizes that go with them."""


def test_every_option_is_read():
    text = "\n".join(
        path.read_text()
        for path in ROOM.rglob("*.py")
        if path.parent.name != "config" or path.stem in ("build", "advice")
    )
    by_name = {f"dataset.{name}" for kind in KINDS.values() for name in kind.options}
    by_name |= {name for name, _ in ROWS} | ONE_VALUE | SIZES_SAY_IT
    for name, row, _ in rows(Config):
        whole = name.startswith("architecture.") or "meaning" not in row.metadata
        if name not in by_name and not whole:
            assert re.search(rf"\.{name.rpartition('.')[2]}\b", text), f"nothing reads {name}"
    for name, row, _ in rows(Config):
        if name in ONE_VALUE:
            assert len(row.metadata["choices"]) == 1
