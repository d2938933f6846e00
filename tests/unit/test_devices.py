"""Four virtual devices: the numbers of one, and a quarter of its work, bytes and no more talk.

The devices are those of a process of its own: this one has two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llqr

ROOT = Path(__file__).parents[2]
MESHES = ("data", "fsdp", "tensor", "2x2")
STREAMED = ["diagonal", "e-kfac", "e-kfac-gpt", "kfac"]
TOLERANCE = 1e-12


def told(*command: str) -> list[Any]:
    """Return the lines of JSON that a program prints."""
    environment = os.environ | {  # what is counted is counted in programs as users have them
        "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "TF_CPP_MIN_LOG_LEVEL": "3",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def tolerance(case: list[Any]) -> float:
    """How far apart numbers may be: half the digits turn bases that gradients have not filled."""
    return 1e-8 if "streaming" in case else TOLERANCE


def check(cases: list[Any]) -> None:
    """Raise AssertionError where a case is not as on one device."""
    found = told("tests/devices.py", json.dumps(cases))
    assert len(found) == len(cases)
    bad = [f for f in found if "error" in f or not f["apart"] < tolerance(f["case"])]
    assert not bad, bad


def test_the_numbers_of_one_device() -> None:
    """Both kinds of axes, parts of matrices, streaming, probes, each place of P."""
    check(
        [
            ["2x2", "explicit", "cut", "blocks", ["e-kfac", "diagonal"]],
            ["fsdp", "explicit", "streaming", "blocks", ["e-kfac", "diagonal"]],
            ["data", "explicit", "probe", "params", ["kfac"]],
        ]
    )


@pytest.mark.parametrize(("first", "last"), [(4, 6), pytest.param(0, 4, marks=pytest.mark.slow)])
def test_exact_steps_with_rows_over_devices(first: int, last: int) -> None:
    """Dual, primal and cg, in chunks, of rows that meet and rows that do not."""
    found = told("tests/exact_devices.py", str(first), str(last))
    assert len(found) == last - first
    bad = [f for f in found if not f["apart"] < 1e-10]
    assert not bad, bad


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("shard", ["params", "blocks"])
@pytest.mark.parametrize("way", ["published", "probe", "chunks", "streaming"])
def test_every_structure_on_every_mesh(way: str, shard: str, mesh: str, kind: str) -> None:
    structures = STREAMED if way == "streaming" else list(llqr.STRUCTURES)
    check([[mesh, kind, way, shard, structures]])


def shares(*ways: str) -> dict[tuple[str, ...], Any]:
    """Return the rows of the benchmark, by what they are of."""
    (rows,) = told("benchmarks/device_share.py", "--json", *ways)
    return {(r["devices"], r["P"], r["shard"], r["of a"]): r for r in rows}


def hold(found: dict[tuple[str, ...], Any], groups: int) -> None:
    """Check the bounds on work, bytes and collectives of one way."""
    (way,) = {way for _, way, *_ in found} - {"plain SGD"}
    for (mesh, _, shard, what), row in found.items():
        where = (mesh, way, shard, what)
        if mesh == "fsdp=4" and shard:
            assert row["bytes of P"] <= 0.27, where
        if shard == "blocks" or way == "diagonal":
            assert row["flops"] <= (0.28 if what == "refit" else 0.30), where
            if what == "step":
                assert row["all-gathers"] <= 2 * groups, where


@pytest.mark.slow
def test_the_share_of_each_device_elementwise() -> None:
    hold(shares("diagonal"), groups=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["e-kfac", "e-kfac in chunks", "streaming e-kfac"])
def test_the_share_of_each_device(way: str) -> None:
    """Two groups: the layers, and the head, which has no like."""
    found = shares(way)
    hold(found, groups=2)
    assert found["data=4", way, "params", "step"]["flops"] > 0.4, "every device multiplies all of P"
