"""What a report says in words."""

import jax.numpy as jnp
import optax
import pytest

import llqr
from llqr.refit.remedies import PUBLISHED


def report(objective, **options):
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    refit = llqr.Refit(every=None, steps=5, **options.pop("refit", {}))
    tx = llqr.llqr(optax.sgd(0.1), metric="gauss_newton", refit=refit, **options)
    x = jnp.array([[1.0, 2.0], [0.5, -1.0]])
    return llqr.inspect(tx, llqr.refresh(tx, tx.init(params), params, objective.bind(x)), params)


SQUARES = llqr.Objective(lambda p, x: x @ p["a"] + p["b"], lambda z, x: jnp.sum((z - x) ** 2))


def test_nothing_is_said_of_a_refit_that_did_its_work():
    found = report(SQUARES, damping=0.1, refit={"learning_rate": 0.01})
    assert {block.status for block in found.blocks} == {"updated"}
    assert found.advice == ()


@pytest.mark.parametrize(
    ("structure", "words"), [("kfac", "kept their old P"), ("diagonal", "zero but for rounding")]
)
def test_steps_that_are_too_long(structure, words):
    refit = {"learning_rate": 100.0, "clip_norm": None}
    (told,) = report(SQUARES, structure=structure, refit=refit).advice
    assert told.startswith("2 of 2 blocks (a, b) ")
    assert words in told
    assert "learning_rate by 10" in told


def test_a_metric_without_curvature():
    linear = llqr.Objective(lambda p, x: x @ p["a"] + p["b"], lambda z, x: jnp.sum(z))
    (told,) = report(linear).advice
    assert "no curvature" in told


def test_a_p_that_does_nothing():
    (told,) = report(SQUARES, refit={"learning_rate": 1e-7}).advice
    assert "hardly changes" in told


@pytest.mark.parametrize("status", [s for s in llqr.STATUS if s not in ("none", "updated")])
def test_every_status_that_is_not_well_has_its_words(status):
    assert status in PUBLISHED.by_status
