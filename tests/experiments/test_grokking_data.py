"""The grokking sets: every equation against plain Python, and the split."""

import itertools
import time
from contextlib import closing

import numpy as np
import pytest

from llqr_experiments.data import DataError, evaluation_batches, grokking, train_stream
from llqr_experiments.data.operations import OPERATIONS, _split


def slow_modular(operation: str, p: int) -> dict[tuple[int, int], int]:
    """Return (a, b) -> result, found by trying."""
    first = 1 if operation in ("mod_division", "mod_exp") else 0
    table = {}
    for a in range(p):
        for b in range(first, p):
            if operation == "mod_division":
                (table[a, b],) = [c for c in range(p) if c * b % p == a]
            elif operation == "mod_exp":
                table[a, b] = a**b % p
            else:
                sign = {"mod_sum": "+", "mod_subtract": "-", "mod_mul": "*"}[operation]
                table[a, b] = eval(f"a {sign} b") % p
    return table


def slow_permutations(k: int) -> dict[tuple[int, int], int]:
    group = list(itertools.permutations(range(k)))
    return {
        (i, j): group.index(tuple(a[b[x]] for x in range(k)))
        for (i, a), (j, b) in itertools.product(enumerate(group), repeat=2)
    }


def equations(*splits) -> list[tuple[int, ...]]:
    """Return (a, b, result) of every example, after a check of the two fixed tokens."""
    tokens = np.concatenate([split.tokens for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    assert (tokens[:, 1] == 0).all()
    assert (tokens[:, 3] == 1).all()
    columns = (tokens[:, 0] - 2, tokens[:, 2] - 2, labels)
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


def check(data, table: dict[tuple[int, int], int], group: int) -> None:
    """Every pair of the table is in one of the splits, once, with its result."""
    found = equations(data.train, data.test)
    assert len(found) == len(table)
    assert {(a, b): c for a, b, c in found} == table
    assert data.num_classes == len(set(table.values())) == group
    assert data.vocabulary == group + 2
    assert data.length == 4


@pytest.mark.parametrize("p", [2, 3, 5, 7, 23])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "permutation"])
def test_modular_against_trying(operation, p):
    check(grokking(operation, p=p, train_fraction=0.5), slow_modular(operation, p), p)


@pytest.mark.parametrize(("k", "group"), [(2, 2), (3, 6), (4, 24)])
def test_permutations_against_composition(k, group):
    check(grokking("permutation", k=k), slow_permutations(k), group)


def test_permutations_are_a_group():
    """Element 0 is neutral, and composition associative, for the 120 of the papers."""
    data = grokking("permutation")
    table = np.full((120, 120), -1)
    a, b, c = np.array(equations(data.train, data.test)).T
    table[a, b] = c
    np.testing.assert_array_equal(table[0], np.arange(120))
    np.testing.assert_array_equal(table[:, 0], np.arange(120))
    assert all(len(set(row)) == 120 for row in (*table, *table.T))
    x, y, z = np.random.default_rng(0).integers(0, 120, (3, 1000))
    np.testing.assert_array_equal(table[table[x, y], z], table[x, table[y, z]])


@pytest.mark.parametrize(
    ("operation", "train", "test", "classes"),
    [
        ("mod_sum", 5645, 3764, 97),
        ("mod_subtract", 5645, 3764, 97),
        ("mod_mul", 5645, 3764, 97),
        ("mod_division", 5587, 3725, 97),
        ("mod_exp", 5587, 3725, 97),
        ("permutation", 8640, 5760, 120),
    ],
)
def test_sizes_of_the_papers(operation, train, test, classes):
    start = time.process_time()
    data = grokking(operation)
    seconds = time.process_time() - start
    print(f"{operation}: {1e3 * seconds:.1f} ms")
    assert seconds < 1
    assert (len(data.train), len(data.test)) == (train, test)
    assert (data.num_classes, data.vocabulary) == (classes, classes + 2)
    assert set(data.train.labels.tolist()) == set(range(classes))
    assert data.train.tokens.dtype == data.train.labels.dtype == np.int32


class TestSplit:
    def test_is_seeded(self):
        one, same, other = (grokking("mod_sum", p=11, seed=seed) for seed in (3, 3, 4))
        np.testing.assert_array_equal(one.train.tokens, same.train.tokens)
        assert set(equations(one.train)) != set(equations(other.train))
        assert set(equations(one.train, one.test)) == set(equations(other.train, other.test))

    def test_is_frozen(self):
        """Results of different versions are compared on this split."""
        order = np.random.RandomState(0).permutation(97 * 97)
        pairs = [divmod(int(i), 97) for i in order]
        expected = [(a, b, (a + b) % 97) for a, b in pairs]
        data = grokking("mod_sum")
        assert equations(data.train, data.test) == expected
        assert expected[0] == (66, 47, 16)

    @pytest.mark.parametrize(
        ("fraction", "train"), [(0.29, 29), (0.57, 57), (0.999, 99), (0.01, 1)]
    )
    def test_fraction_is_decimal(self, fraction, train):
        """0.29 x 100 and 0.57 x 100 are below 29 and 57 in floating point."""
        shown, hidden = _split(100, fraction, 0)
        assert len(shown) == train
        assert sorted([*shown, *hidden]) == list(range(100))


class TestPipeline:
    def test_gather(self):
        split = grokking("mod_mul", p=7).test
        batch = split.gather(np.array([3, 0, 3]))
        assert batch.keys() == {"tokens", "label"}
        np.testing.assert_array_equal(batch["tokens"], split.tokens[[3, 0, 3]])
        np.testing.assert_array_equal(batch["label"], split.labels[[3, 0, 3]])
        drawn = split.draw(np.array([3, 0, 3]), np.random.default_rng(0))
        np.testing.assert_array_equal(drawn["tokens"], batch["tokens"])

    def test_epochs(self):
        data = grokking("mod_sum", p=5)
        with closing(train_stream(data.train, batch_size=5, seed=0, num_threads=0)) as stream:
            epoch = [next(stream) for _ in range(3)]
        seen = np.concatenate([batch["tokens"] for batch in epoch])
        assert sorted(seen.tolist()) == sorted(data.train.tokens.tolist())
        (batch,) = evaluation_batches(data.test, 16)
        assert batch["mask"].sum() == 10
        assert batch["tokens"].shape == (16, 4)


class TestErrors:
    def test_operation(self):
        with pytest.raises(DataError, match=r"unknown operation 'mod_div': did you mean 'mod_div"):
            grokking("mod_div")

    @pytest.mark.parametrize(
        ("p", "message"),
        [
            (1, r"p is 1, expected a prime from 2 to 5000"),
            (5003, r"p is 5003, expected a prime from 2 to 5000"),
            (91, r"p is 91 = 7 x 13, expected a prime.*The nearest is 89"),
            (4, r"p is 4 = 2 x 2, .*The nearest is 3"),
            (4998, r"p is 4998 = 2 x 2499, .*The nearest is 4999"),
        ],
    )
    def test_p(self, p, message):
        with pytest.raises(DataError, match=message):
            grokking("mod_sum", p=p)

    @pytest.mark.parametrize("k", [1, 7])
    def test_k(self, k):
        with pytest.raises(DataError, match=rf"k is {k}, expected 2 to 6"):
            grokking("permutation", k=k)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
    def test_fraction(self, fraction):
        with pytest.raises(DataError, match=r"train_fraction is .*, expected more than 0 and less"):
            grokking("mod_sum", train_fraction=fraction)

    def test_nothing_to_train_on(self):
        with pytest.raises(DataError, match=r"none of 4 equations to train on, expected 0.25 or"):
            grokking("mod_sum", p=2, train_fraction=0.2)

    def test_seed(self):
        with pytest.raises(DataError, match=r"seed is -1, expected 0 or more"):
            grokking("mod_sum", seed=-1)
