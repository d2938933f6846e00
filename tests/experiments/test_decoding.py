"""Beam search against enumeration and against a search that decodes everything again; float64."""

from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llqr_experiments.errors import ConfigError
from llqr_experiments.models import make, network
from llqr_experiments.models.decoding import END, PAD, Decoder, Hypotheses, Rules, beam_search
from llqr_experiments.models.translation import decoder

OPTIONS = {"width": 8, "heads": 2, "mlp": 8, "depth": 2, "source_vocabulary": 9}
VOCABULARY = 8


pytestmark = pytest.mark.usefixtures("float64")


class Translation(NamedTuple):
    params: Any
    forward: Any  # (params, tokens) -> [B T, V]
    decoder: Decoder


@cache
def translation() -> Translation:
    """A model with peaked predictions: otherwise every hypothesis has the same length."""
    model = make("transformer-iwslt-de-en", (), VOCABULARY, seed=0, options=OPTIONS)
    net = network(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(x + rng.normal(size=x.shape) / 3), net.params)
    return Translation(params, jax.jit(net.model.bind({})), decoder(model))


SOURCE = np.array([[4, 5, 6, 2], [7, 2, PAD, PAD], [PAD, 8, 4, 2], [5, 5, 5, 2]])


# --- a search written plainly -------------------------------------------------------------------


@dataclass
class Found:
    tokens: list[int]
    score: float


def plain_search(predict, source, rules) -> list[Found]:
    """The rules, one sentence and one beam at a time; `predict` reads a whole prefix again."""
    limit = min(int(rules.ratio * sum(source != PAD) + rules.extra), rules.maximum)
    beams, finished = [Found([], 0.0)], []
    for step in range(limit + 1):
        candidates = []
        for beam in beams:
            for token, log_prob in enumerate(predict([END, *beam.tokens])):
                legal = token != PAD and not (token == END and step == 0)
                if legal and (token == END or step < limit):
                    candidates.append(Found([*beam.tokens, token], beam.score + log_prob))
        candidates = sorted(candidates, key=lambda c: -c.score)[: 2 * rules.beam]
        for candidate in candidates[: rules.beam]:
            if candidate.tokens[-1] == END and len(finished) < rules.beam:
                finished.append(
                    Found(candidate.tokens, candidate.score / (step + 1) ** rules.penalty)
                )
        if len(finished) == rules.beam:
            break
        beams = [c for c in candidates if c.tokens[-1] != END][: rules.beam]
    return sorted(finished, key=lambda f: -f.score)


def hypotheses(found: Hypotheses, i: int) -> list[Found]:
    """Those of sentence i, checked to be well-formed."""
    out = []
    for tokens, length, score in zip(*(np.asarray(x)[i] for x in found), strict=True):
        if length:
            assert tokens[length - 1] == END
            assert END not in tokens[: length - 1]
            assert PAD not in tokens[:length]
            out.append(Found(tokens[:length].tolist(), float(score)))
        else:
            assert score == -np.inf
        assert (tokens[length:] == PAD).all()
    return out


def same(found: list[Found], expected: list[Found]) -> None:
    assert [f.tokens for f in found] == [f.tokens for f in expected]
    np.testing.assert_allclose(
        [f.score for f in found], [f.score for f in expected], rtol=1e-10, atol=1e-12
    )


def by_whole_forward(source):
    """Prefix -> log-probabilities of the next token, by the staged model, without a cache."""
    model, width = translation(), 24

    @cache
    def predict(prefix):
        target = np.full((1, width), PAD)
        target[0, : len(prefix)] = prefix
        rows = model.forward(model.params, {"source": source[None], "target_in": target})
        return np.asarray(rows[len(prefix) - 1]).tolist()

    return lambda prefix: predict(tuple(prefix))


# --- a model that is a table --------------------------------------------------------------------


def table_decoder(transitions):
    """A Markov chain: transitions [V, V], log-probabilities of the next token by the last one."""
    table = jnp.asarray(transitions)

    def step(params, memory, cache, tokens, position):
        return params * table[tokens], cache

    return Decoder(lambda params, source: source, lambda memory, beams, length: (), step)


def chain(seed, size):
    rng = np.random.default_rng(seed)
    return np.array(jax.nn.log_softmax(2.0 * rng.normal(size=(size, size))))


# --- step by step -------------------------------------------------------------------------------


def test_step_by_step_is_the_whole_forward():
    """With the same parameters: every beam reads its own prefix."""
    model = translation()
    prefixes = np.random.default_rng(0).integers(3, VOCABULARY, (4, 3, 6))
    prefixes[:, :, 0] = END
    encode, step = jax.jit(model.decoder.encode), jax.jit(model.decoder.step)
    memory = encode(model.params, SOURCE)
    cache = model.decoder.start(memory, 3, 9)
    for beam in range(3):
        tokens = {"source": SOURCE, "target_in": prefixes[:, beam]}
        whole = model.forward(model.params, tokens).reshape(4, 6, VOCABULARY)
        for t in range(6):
            if beam == 0:
                found, cache = step(model.params, memory, cache, prefixes[:, :, t], t)
                steps = [found] if t == 0 else [*steps, found]  # noqa: F821
            np.testing.assert_allclose(steps[t][:, beam], whole[:, t], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beam", [1, 2, pytest.param(5, marks=pytest.mark.slow)])
def test_search_is_the_plain_search(beam):
    """Hypothesis by hypothesis and score by score, sentences of different lengths together."""
    model, rules = translation(), Rules(beam=beam, extra=4)
    found = beam_search(model.decoder, model.params, SOURCE, rules)
    lengths = set()
    for i, source in enumerate(SOURCE):
        expected = plain_search(by_whole_forward(source), source, rules)
        same(hypotheses(found, i), expected)
        lengths |= {len(f.tokens) for f in expected}
    assert len(lengths) > 1


def test_one_beam_is_greedy():
    model = translation()
    found = beam_search(model.decoder, model.params, SOURCE, Rules(beam=1, extra=4))
    for i, source in enumerate(SOURCE):
        predict, tokens, score = by_whole_forward(source), [], 0.0
        limit = int(1.2 * sum(source != PAD) + 4)
        while tokens[-1:] != [END]:
            log_probs = np.array(predict([END, *tokens]))
            log_probs[[PAD] if tokens else [PAD, END]] = -np.inf
            tokens.append(END if len(tokens) == limit else int(np.argmax(log_probs)))
            score += log_probs[tokens[-1]]
        same(hypotheses(found, i), [Found(tokens, float(score) / len(tokens))])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_is_enumeration(penalty):
    """Tokens 0, 3 and the end, at most three before the end: 3 + 9 + ... sequences in all."""
    transitions, longest = chain(0, 4), 3
    rules = Rules(beam=40, penalty=penalty, ratio=0.0, extra=longest)
    found = beam_search(table_decoder(transitions), jnp.ones(()), np.array([[5, 2]]), rules)
    everything = []
    for length in range(1, longest + 1):
        for tokens in product([0, 3], repeat=length):
            path = [END, *tokens, END]
            score = sum(transitions[a, b] for a, b in pairwise(path))
            everything.append(Found(path[1:], score / (length + 1) ** penalty))
    assert len(everything) == 14
    same(hypotheses(found, 0), sorted(everything, key=lambda f: -f.score))


@pytest.mark.parametrize("seed", range(4))
def test_the_rules_on_random_chains(seed):
    """Many endings, forced endings, small vocabularies: against the plain search."""
    transitions = chain(seed, 5)
    rules = Rules(beam=1 + seed, penalty=seed / 2, ratio=0.5, extra=2)
    source = np.array([[4, 2, PAD, PAD], [4, 4, 4, 2]])
    found = beam_search(table_decoder(transitions), jnp.ones(()), source, rules)
    for i in range(2):
        predict = lambda prefix: transitions[prefix[-1]]  # noqa: E731
        same(hypotheses(found, i), plain_search(predict, source[i], rules))


def test_equal_candidates_are_ordered_by_beam_then_token():
    even = np.full((6, 6), -np.log(6.0))
    found = beam_search(
        table_decoder(even), jnp.ones(()), np.array([[4, 2]]), Rules(beam=3, penalty=0.0, extra=1)
    )
    # 0 is the first of equals; of what follows, the end is the first that is legal but for 0.
    predict = lambda prefix: even[0]  # noqa: E731
    expected = plain_search(predict, np.array([4, 2]), Rules(beam=3, penalty=0.0, extra=1))
    same(hypotheses(found, 0), expected)


def test_padding_and_company_change_nothing():
    """Other pads, another order, and a sentence of pads, which has no hypothesis."""
    model, rules = translation(), Rules(beam=2, extra=4)
    search = partial(beam_search, model.decoder, model.params, rules=rules)
    together, moved = search(SOURCE), np.full((5, 7), PAD)
    for i, source in enumerate(SOURCE):
        real = source[source != PAD]
        moved[4 - i, i : i + len(real)] = real
    found = search(moved)
    for i in range(4):
        same(hypotheses(found, 4 - i), hypotheses(together, i))
    assert hypotheses(found, 0) == []


def test_nan_is_never_chosen():
    transitions = chain(3, 5)
    transitions[:, 4] = np.nan
    found = beam_search(table_decoder(transitions), jnp.ones(()), np.array([[4, 2]]), Rules(beam=2))
    for hypothesis in hypotheses(found, 0):
        assert 4 not in hypothesis.tokens
        assert np.isfinite(hypothesis.score)


def test_the_loop_stops_early_and_compiles_once():
    steps, traces = [], []

    def step(params, memory, cache, tokens, position):
        traces.append(position)
        jax.debug.callback(lambda p: steps.append(int(p)), position)
        certain = jnp.full((6,), -20.0).at[jnp.where(position < 3, 4, END)].set(-0.01)
        return jnp.broadcast_to(certain, (*tokens.shape, 6)), cache

    stub = Decoder(lambda params, source: (), lambda memory, beams, length: (), step)
    source = np.full((2, 9), 5)
    found = beam_search(stub, (), source, Rules(beam=1))
    jax.effects_barrier()
    assert found.lengths.tolist() == [[4], [4]]
    assert sorted(steps) == [0, 1, 2, 3]  # callbacks have no order
    traced = len(traces)
    beam_search(stub, (), source + 1, Rules(beam=1))
    assert len(traces) == traced


def test_longest_length_follows_the_real_tokens():
    assert [Rules().limit(n) for n in (0, 1, 5, 7, 35, 844, 5000)] == [
        10, 11, 16, 18, 52, 1022, 1023,
    ]  # fmt: skip
    never = np.full((5, 5), -50.0)
    never[:, 4] = -0.01
    source = np.array([[4, 2, PAD, PAD, PAD, PAD], [4, 4, 4, 4, 4, 2]])
    found = beam_search(table_decoder(never), jnp.ones(()), source, Rules(beam=1))
    assert found.lengths[:, 0].tolist() == [12 + 1, 17 + 1]


@pytest.mark.parametrize(
    "options", [{"beam": 0}, {"ratio": -1.0}, {"extra": -1}, {"maximum": 0}], ids=str
)
def test_rules_that_are_none(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Rules(**options)
