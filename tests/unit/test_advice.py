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


def test_before_the_first_step_there_is_no_direction():
    """A refit from outside and then a step, as the docs say; published refits have an h."""
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    x = jnp.array([[1.0, 2.0], [0.5, -1.0]])
    for every in (None, 10):
        tx = llqr.streaming(0.1, metric="gaussian", refit=llqr.Streaming(every=every))
        assert llqr.inspect(tx, tx.init(params), params).advice == ()
        state = llqr.refresh(tx, tx.init(params), params, SQUARES.bind(x))
        assert llqr.inspect(tx, state, params).advice == ()
    _, state = tx.update(params, tx.init(params), params, refresh=False)
    (told,) = llqr.inspect(tx, state, params).advice
    assert "never refitted" in told


def test_gradients_that_were_not_finite_are_told():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    bad = {"a": jnp.full((2, 2), jnp.nan), "b": jnp.ones(2)}
    for refit in (llqr.Streaming(probe="gradient"), llqr.Streaming(), llqr.Refit()):
        tx = llqr.scale_by_llqr(metric="gaussian", refit=refit)
        state = tx.init(params)
        for gradient in (params, bad, params):
            _, state = tx.update(gradient, state, params, refresh=False)
        assert int(llqr.find(state).refit.dropped) == 1
        assert llqr.inspect(tx, state, params).advice[0].startswith("1 gradients so far were not")


def test_what_update_takes_is_said():
    params = {"a": jnp.ones((2, 2))}
    for refit, words in (
        (llqr.Streaming(probe="gradient"), "takes no objective"),
        (llqr.Streaming(every=None), "from llqr.refresh alone"),
        (llqr.Streaming(), "takes objective=objective.bind(batch), and refuses without"),
        (llqr.Refit(), "takes objective=objective.bind(batch), and refuses without"),
    ):
        tx = llqr.scale_by_llqr(refit=refit)
        assert words in str(llqr.inspect(tx, tx.init(params), params))
