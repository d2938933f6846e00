"""Tasks of text and translation: padding, micro-batches, evaluation, translations; float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sacrebleu
from jax.flatten_util import ravel_pytree

import llqr
from llqr_experiments.config.options import TranslationEval
from llqr_experiments.data import IGNORE
from llqr_experiments.data.translation import EOS, PAD, UNK, Pairs, Sentences
from llqr_experiments.models.decoding import Rules, beam_search
from llqr_experiments.run import step, translate
from llqr_experiments.run.evaluate import evaluate
from llqr_experiments.task import tasks
from tests import oracle
from tests.experiments import sequence_files, support
from tests.experiments.sequences import TIED, TINY, Case, plain_text, plain_translation

SMOOTHING = 0.1


pytestmark = pytest.mark.usefixtures("float64")


def build(*overrides):
    """The task in float64, without dropout, and its config."""
    plain = ("architecture.dropout=0.0", "init_key=1", f"label_smoothing={SMOOTHING}")
    config = support.config("logging.aim=false", *plain, *overrides)
    task = tasks.build(config)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), task.params)
    return replace(task, params=wide), config


@pytest.fixture(scope="module")
def translation(tmp_path_factory):
    folder = sequence_files.pairs(tmp_path_factory.mktemp("pairs"))
    return build(*sequence_files.TRANSLATION, f"dataset.dataset_dir={folder}")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, cache = (tmp_path_factory.mktemp(name) for name in ("text", "cache"))
    sequence_files.text(folder)
    return build(
        *sequence_files.TEXT, f"dataset.dataset_dir={folder}", f"dataset.cache_dir={cache}"
    )


def close(found, expected, tolerance=1e-9):
    (a, same), (b, _) = ravel_pytree(found), ravel_pytree(expected)
    del same
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(b))))


# --- a batch, and the same with more padding ----------------------------------------------------


def sentences():
    """Four sentences of 2 to 6 target words, one of which is nothing."""
    return {
        "source": np.array([[PAD, 4, 5, EOS], [4, 6, 7, EOS], [PAD, PAD, 8, EOS], [PAD] * 4]),
        "target_in": np.array([[2, 4, 5, 6], [2, 7, PAD, PAD], [2, PAD, PAD, PAD], [PAD] * 4]),
        "label": np.array([[4, 5, 6, 2], [7, 2, -1, -1], [2, -1, -1, -1], [-1] * 4]),
    }


def windows():
    """Four windows of 5 tokens with 5, 3, 4 and 1 labels; the mask takes out the second."""
    return {
        "tokens": np.array([[1, 2, 3, 4, 5], [5, 1, 1, 0, 0], [2, 4, 1, 3, 0], [6, 0, 0, 0, 0]]),
        "label": np.array([[2, 3, 4, 5, 6], [1, 1, 2, -1, -1], [-1, 1, 3, 2, 4], [1, *[-1] * 4]]),
        "mask": np.array([True, False, True, True]),
    }


def more(batch):
    """The same examples in wider rows, and two more rows, which do not count."""
    wide = lambda x, left, right, value: np.pad(  # noqa: E731
        x, ((0, 2), (left, right)), constant_values=value
    )
    if "source" in batch:
        return {
            "source": wide(batch["source"], 2, 1, PAD),
            "target_in": wide(batch["target_in"], 0, 3, PAD),
            "label": wide(batch["label"], 0, 3, IGNORE),
        }
    label = wide(batch["label"], 0, 3, IGNORE)
    label[-2:] = 3  # the mask alone takes them out
    return {
        "tokens": wide(batch["tokens"], 0, 3, 2),
        "label": label,
        "mask": np.pad(batch["mask"], (0, 2)),
    }


def kinds(*slow):
    """Parameters of a test: the kinds of data, some of them slow."""
    return pytest.mark.parametrize(
        ("kind", "make"),
        [pytest.param(kind, make, id=kind, marks=[pytest.mark.slow] * (kind in slow))
         for kind, make in (("translation", sentences), ("text", windows))],
    )  # fmt: skip


def by_definition(task, batch):
    """Gradient of the loss: the labels that count are picked out, and their mean is taken."""
    rows = (batch["label"] >= 0) & batch.get("mask", np.ones(len(batch["label"]), bool))[:, None]
    places = np.flatnonzero(rows)
    labels = batch["label"].reshape(-1)[places]

    def loss(params):
        log_probs = task.objective.forward(params, {**batch, tasks.STATISTICS: {}})[places]
        right = log_probs[np.arange(len(labels)), labels]
        return -jnp.mean((1 - SMOOTHING) * right + SMOOTHING * jnp.mean(log_probs, 1))

    return jax.jit(jax.grad(loss))(task.params)


def carry():
    return tasks.Carry({}, jax.random.key(0), dict.fromkeys(tasks.CLASSES, jnp.zeros(())))


@kinds("text")
def test_padding_changes_no_loss_gradient_curvature_or_sum(kind, make, request):
    task, _ = request.getfixturevalue(kind)
    random, batch = np.random.default_rng(0), make()
    u = jax.tree.map(lambda x: random.normal(size=x.shape), task.params)

    @jax.jit
    def everything(params, batch):
        take = jax.value_and_grad(task.training, has_aux=True)
        (loss, after), gradient = take(params, batch, carry())
        bound = tasks.bound(task, batch, {})
        model = llqr.linearize(bound, params, "ngd", divergence_reduction="mean")
        objective = oracle.value_and_gradient(model, u)
        sums = tasks.measure(model.outputs, batch)
        return loss, gradient, after.sums, sums, objective, tasks.valid(batch)

    few, many = everything(task.params, batch), everything(task.params, more(batch))
    _, _, trained, sums, _, valid = few
    close(trained, sums)
    assert float(valid) == sums["rows"] == {"translation": 7, "text": 10}[kind]
    for found, same in zip(many, few, strict=True):
        close(found, same)


def refitted(task, batch, chunk=None):
    """The arrays of P after a refit."""
    tx = llqr.llqr(
        optax.sgd(0.1), structure="diagonal", divergence_reduction="mean", damping=0.1,
        refit=llqr.Refit(steps=3, learning_rate=0.1, clip_norm=None),
        route=llqr.Route(chunk_size=chunk),
    )  # fmt: skip
    start = tx.init(task.params)
    state = llqr.refresh(tx, start, task.params, tasks.bound(task, batch, {}))
    found, before = llqr.find(state), llqr.find(start).blocks
    assert float(found.refit.objective_after) < float(found.refit.objective_before)
    assert float(optax.tree.norm(optax.tree.sub(found.blocks, before))) > 1e-2
    return found.blocks


@kinds("translation", "text")
def test_padding_changes_no_refit(kind, make, request):
    task, _ = request.getfixturevalue(kind)
    close(refitted(task, more(make())), refitted(task, make()), 1e-7)


@kinds("translation", "text")
def test_chunks_of_a_refit_count_by_their_labels(kind, make, request):
    task, _ = request.getfixturevalue(kind)
    close(refitted(task, make(), 2), refitted(task, make()), 1e-7)


@kinds("translation")
def test_micro_batches_count_by_their_labels(kind, make, request):
    """The step of two micro-batches is that of the whole batch."""
    task, _ = request.getfixturevalue(kind)
    batch = make()
    counts = [float(tasks.valid({k: x[i::2] for k, x in batch.items()})) for i in (0, 1)]
    assert counts == {"translation": [5, 2], "text": [9, 1]}[kind]
    recipe = step.Recipe(optax.sgd(1.0), microbatches=2, weight=tasks.valid)
    state = step.init(recipe, task.params)
    advance = jax.jit(
        lambda state: step.advance(task.training, recipe, False, state, batch, tasks.CLASSES)
    )
    after, sums = advance(state)
    gradient = by_definition(task, batch)
    close(after.params, jax.tree.map(jnp.subtract, task.params, gradient))
    assert float(sums["rows"]) == sum(counts)


# --- evaluation ---------------------------------------------------------------------------------


def by_hand(log_probs, labels):
    """Sums over all labels by numpy."""
    right = log_probs[np.arange(len(labels)), labels]
    return {
        "loss": -right.sum(),
        "correct": (log_probs.argmax(1) == labels).sum(),
        "rows": len(labels),
    }


def plain_of(kind, task, split):
    """The model once more in numpy, on a split sentence by sentence, window by window."""
    if kind == "translation":
        pairs = getattr(task.material.pairs, split)
        target = [pairs.target[i] for i in range(len(pairs))]
        inputs = {
            "source": [pairs.source[i] for i in range(len(pairs))],
            "target_in": [np.array([EOS, *t[:-1]]) for t in target],
        }
        options = {**TINY, "mlp": 6, **task.material.options}
        case = Case(split, "transformer-iwslt-de-en", (), task.material.classes, options,
                    inputs, None)  # fmt: skip
        return by_hand(plain_translation(case), np.concatenate(target))
    batches = list(task.material.streams.evaluation(split, 1))
    tokens = [b["tokens"][0][b["label"][0] >= 0] for b in batches]
    case = Case(split, "gpt2-small", (8,), task.material.classes, TIED, tokens, None)
    outputs = np.concatenate([plain_text(replace(case, name=f"{split} {i}", inputs=[t]))
                              for i, t in enumerate(tokens)])  # fmt: skip
    stream = np.concatenate([*tokens, [batches[-1]["label"][0][len(tokens[-1]) - 1]]])
    return by_hand(outputs, stream[1:])


@pytest.mark.parametrize("kind", ["translation", "text"])
def test_evaluation_counts_every_token_once_in_batches_of_any_size(kind, request):
    task, _ = request.getfixturevalue(kind)
    expected = plain_of(kind, task, "valid")
    if kind == "translation":
        assert expected["rows"] == len(task.material.pairs.valid.target.words)
    else:
        assert expected["rows"] == len("a bad cab, a dab. ") * 6 - 4 - 1
        assert expected["rows"] % 8, "the last window is full"
    for size in (1, 3, 64):
        batches = task.material.streams.evaluation("valid", size)
        found = evaluate(task.objective, (task.params, {}), batches)
        assert found["rows"] == expected["rows"]
        assert found["correct"] == expected["correct"]
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-9)
    rates = task.material.rates("valid", found)
    mean = expected["loss"] / expected["rows"]
    assert rates["valid loss"] == pytest.approx(mean)
    perplexity = {"translation": "valid_ppl", "text": "valid perplexity"}[kind]
    assert rates[perplexity] == pytest.approx(np.exp(mean))


# --- translations -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking(translation):
    """Parameters with peaked predictions, and references that are what it says, but for one.

    Without that, BLEU would be 0 whatever the options are.
    """
    task, _ = translation
    random, found = np.random.default_rng(5), task.material.pairs
    params = jax.tree.map(lambda x: x + 0.5 * random.normal(size=x.shape), task.params)
    with jax.enable_x64(True):
        said = by_searching(task, params, found.valid, Rules())
    targets = [[7, 10, 9, 7, EOS], *said[1:]]
    lines = np.arange(len(said), dtype=np.int32)
    valid = Pairs(found.valid.source, Sentences.of(targets), lines)
    return task, params, replace(found, valid=valid)


def by_searching(task, params, pairs, rules):
    """Best hypotheses of all sentences in one batch, as numbers."""
    width = pairs.source.lengths.max()
    source = np.full((len(pairs), width), PAD)
    for i in range(len(pairs)):
        source[i, : len(pairs.source[i])] = pairs.source[i]
    found = beam_search(task.decoder, params, source, rules)
    pairs_of = zip(np.asarray(found.tokens[:, 0]), np.asarray(found.lengths[:, 0]), strict=True)
    return [tokens[:n].tolist() for tokens, n in pairs_of]


def words(data, numbers, unknown="UNKNOWNTOKENINHYP"):
    return " ".join(unknown if n == UNK else data.target.words[n] for n in numbers[:-1])


@pytest.mark.parametrize(
    ("options", "rules", "batches"),
    [
        (TranslationEval(), Rules(),
         [(64, {}), (2, {"padding_factor": 16, "left_pad_source": False})]),
        pytest.param(
            TranslationEval(beam_size=1, max_len_a=0.5, max_len_b=1),
            Rules(beam=1, ratio=0.5, extra=1), [(2, {"padding_factor": 16})],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["defaults", "greedy and short"],
)  # fmt: skip
def test_translations_are_those_of_the_search_whatever_the_padding(
    speaking, options, rules, batches
):
    task, params, data = speaking
    said = [words(data, s) for s in by_searching(task, params, data.valid, rules)]
    references = [words(data, data.valid.target[i], "UNKNOWNTOKENINREF") for i in range(len(said))]
    expected = sacrebleu.corpus_bleu(said, [references])
    for size, changes in batches:
        given = replace(data, bucketing=replace(data.bucketing, **changes))
        found = translate.translate(task.decoder, params, given, "valid", options, batch_size=size)
        assert found.examples == len(said)
        shown = [0, 1, 3, 4, 6]  # of seven
        assert [s.hypothesis for s in found.samples] == [said[i] for i in shown]
        assert [s.reference for s in found.samples] == [references[i] for i in shown]
        assert found.bleu.score == pytest.approx(expected.score)
        assert found.bleu.counts == tuple(expected.counts)
    assert 0 < expected.score < 100


def test_a_sample_is_spread_over_the_split_and_text_is_written_as_asked(speaking):
    task, params, data = speaking
    # Names of words are what text is made of: they may be parts, and punctuation.
    names = list(data.target.words)
    names[7], names[9], names[10] = "x@@", ",", "&apos;t"
    data = replace(data, target=replace(data.target, words=tuple(names)))
    said = [words(data, s) for s in by_searching(task, params, data.valid, Rules())]
    found = {}
    for how in ("moses", "space", "none"):
        found[how] = translate.translate(
            task.decoder, params, data, "valid", TranslationEval(detok=how), batch_size=64, most=3
        )
        assert found[how].examples == len(found[how].samples) == 3
    chosen = [0, 3, 6]  # of seven
    joined = [said[i].replace("@@ ", "").removesuffix("@@") for i in chosen]
    assert [s.hypothesis for s in found["none"].samples] == joined
    assert found["none"] == found["space"]
    sources = [" ".join(data.source.words[n] for n in data.valid.source[i][:-1]) for i in chosen]
    assert [s.source for s in found["none"].samples] == sources
    moses = [s.hypothesis for s in found["moses"].samples]
    assert moses != joined
    assert not any(" ," in text for text in moses)
