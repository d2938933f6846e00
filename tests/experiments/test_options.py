"""The table of options: what each becomes is there, legal where the option is, and read."""

import dataclasses
import inspect
import re
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import pytest

import llqr
from llqr.refit.ways import way
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.config.row import accepted, become, rows
from llqr_experiments.data import translation
from llqr_experiments.data.kinds import KINDS
from llqr_experiments.models.decoding import Rules
from llqr_experiments.run.step import Recipe
from tests.experiments import support

HORIZON = build.Horizon(100.0, 2.0)
ROOM = Path(__file__).parents[2] / "src" / "llqr_experiments"


def defaults(owner):
    """Field -> its default, of a class or a function."""
    return {name: row.default for name, row in inspect.signature(owner).parameters.items()}


OWNERS = {
    "refit": defaults(llqr.Refit),
    "route": defaults(llqr.Route),
    "streaming": defaults(llqr.Streaming),
    "llqr": defaults(llqr.llqr),
    "sam": defaults(llqr.Sharpness) | defaults(llqr.sam),
    "asam": defaults(llqr.asam),
    "fisher_sam": defaults(llqr.fisher_sam),
    "exact": defaults(llqr.exact),
    "trust": defaults(llqr.Trust),
    "recipe": defaults(Recipe),
    "rules": defaults(Rules),
    "bucketing": defaults(translation.Bucketing),
}
ROWS = [(name, row) for name, row, _ in rows(Config) if row.metadata.get("becomes")]


def test_what_an_option_becomes_is_there():
    for name, row in ROWS:
        for path in row.metadata["becomes"]:
            owner, _, field = path.partition(".")
            assert field in OWNERS[owner], f"{name} becomes {path}"


def test_every_field_of_a_refit_and_of_its_route_is_an_option():
    config = Config()
    assert set(become(config, "refit")) == set(OWNERS["refit"])
    assert set(become(config, "route")) == set(OWNERS["route"]) - {"axis_name"}  # pmap, shard_map
    assert set(become(config, "streaming")) == set(OWNERS["streaming"])
    assert set(become(config, "trust")) == set(OWNERS["trust"])


# One seed of a run, which the papers' commands give, is that of all that draws.
SEED = (123, 0)
OTHER_DEFAULTS = {
    "refit.seed": SEED,
    "streaming.seed": SEED,
    "recipe.seed": SEED,
    # None is what suits the way of learning P, and the options are those of the published one:
    # method=streaming brings the others.
    "llqr.damping": (0.0, None),
    "llqr.divergence_reduction": ("sum", None),
    "llqr.graft": ("none", None),
}
"""Defaults of options that are not those of the fields they become: (ours, theirs), and why."""


def assert_same(ours, theirs, place):
    """Equal values of one type, or a difference that is listed."""
    if (type(ours), ours) != (type(theirs), theirs):
        assert OTHER_DEFAULTS.get(place) == (ours, theirs), place
    else:
        assert place not in OTHER_DEFAULTS, f"{place}: no difference any more"


@pytest.mark.parametrize("owner", OWNERS)
def test_an_option_has_the_default_of_what_it_becomes(owner):
    found = become(Config(), owner)
    assert found
    for field, value in found.items():
        assert_same(value, OWNERS[owner][field], f"{owner}.{field}")


@pytest.mark.parametrize("mode", build.METHODS)
def test_every_way_of_sam_has_the_defaults_of_the_options(mode):
    make = build.METHODS[mode]
    given = accepted(make, become(Config(), "sam") | become(Config(), mode))
    assert given == {name: defaults(make)[name] for name in given}


CHOICES = [
    (name, row.metadata, path)
    for name, row in ROWS
    if "choices" in row.metadata
    for path in row.metadata["becomes"]
]
LITERALS = {
    "exact": llqr.exact,
    "refit": llqr.Refit,
    "route": llqr.Route,
    "llqr": llqr.llqr,
    "sam": llqr.Sharpness,
}


@pytest.mark.parametrize(("name", "rules", "path"), CHOICES, ids=[path for *_, path in CHOICES])
def test_the_choices_of_an_option_are_the_librarys(name, rules, path):
    owner, _, field = path.partition(".")
    if owner in LITERALS and path != "refit.solver":  # a name or a transformation
        kind = get_type_hints(LITERALS[owner])[field]
        theirs = {x for part in (kind, *get_args(kind)) for x in get_args(part)} - {NoneType}
        convert = rules.get("convert", {})
        ours = {convert.get(choice, choice) for choice in rules["choices"]}
        assert ours == {x for x in theirs if isinstance(x, str)}, name


def test_so_have_options_that_become_no_field_by_themselves():
    ours, theirs = Config(), defaults(llqr.llqr)
    assert ours.block_structure == theirs["structure"]
    assert ours.divergence == theirs["metric"]
    assert ours.divergence_order_param == defaults(llqr.metrics.resolve)["order"]
    (rank,) = (row.metadata["meaning"] for name, row, _ in rows(Config) if name == "precond_rank")
    assert rank.endswith(f"null: {llqr.STRUCTURES['low-rank-memory'].rank}")


def test_the_method_of_streaming_is_the_librarys():
    ours, theirs = support.config("method=streaming"), defaults(llqr.streaming)
    assert (ours.block_structure, theirs["structure"]) == ("e-kfac", None)  # "auto" is e-kfac
    theirs["damping"] = way(llqr.Streaming()).defaults.damping  # None: its learner's
    found = become(ours, "llqr") | {"metric": ours.divergence}
    shared = theirs.keys() & found.keys() - {"structure"}
    assert shared >= {"damping", "graft", "max_dim", "block_size", "shard"}
    assert {name: found[name] for name in shared} == {name: theirs[name] for name in shared}


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
