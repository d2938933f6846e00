"""A mesh of devices: the numbers of one device, rows of batches, checkpoints in pieces."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llqr
from llqr_experiments import data
from llqr_experiments.command import forecast
from llqr_experiments.data.variants import cifar_augmentation
from llqr_experiments.errors import ConfigError
from llqr_experiments.layout import Layout, Share, arrange
from llqr_experiments.record.clock import Clock
from llqr_experiments.record.console import Display
from llqr_experiments.record.trackers import Trackers
from llqr_experiments.run import checkpoint, phases
from llqr_experiments.run.checkpoint import Checkpoints
from llqr_experiments.run.job import prepare
from llqr_experiments.run.origin import origin
from llqr_experiments.run.preemption import Interrupts
from llqr_experiments.run.session import Desk
from llqr_experiments.run.session import begin as open_session
from llqr_experiments.run.step import begin, shardings
from llqr_experiments.run.train import train_step
from tests.experiments import sequence_files, support
from tests.experiments.sequence_files import TEXT, TRANSLATION

FSDP = ("mesh.data=1", "mesh.fsdp=2")
QUICK = (
    "precision=float64", "architecture.hidden=[16]", "max_steps=6", "logging_freq=1",
    "test_eval_freq=3", "update_preconditioner_every=3", "precond_steps=2",
)  # fmt: skip


def assert_alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], within: float) -> None:
    """Two records differ by rounding alone."""
    assert len(ours) == len(theirs)
    for mine, other in zip(support.timeless(ours), support.timeless(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert value == pytest.approx(other[name], rel=within, abs=within), name


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> list[dict[str, Any]]:
    """The record of a run on one device."""
    return support.run(tmp_path_factory.mktemp("one") / "run", *QUICK)


@pytest.mark.parametrize(
    "mesh",
    [
        FSDP,
        pytest.param(("mesh.data=2",), marks=pytest.mark.slow),
        pytest.param(("mesh.data=null", "mesh.tensor=2"), marks=pytest.mark.slow),
    ],
    ids=["fsdp", "data", "tensor"],
)
def test_a_run_on_two_devices_has_the_numbers_of_one(tmp_path, capsys, one, mesh):
    assert_alike(support.run(tmp_path / "run", *QUICK, *mesh), one, 1e-12)
    assert "2 devices of 1 process(es): " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "meta.json").read_text())["processes"] == 1


@pytest.mark.slow
def test_devices_with_blocks_of_their_own_have_the_numbers_of_one(tmp_path):
    options = (*QUICK[:1], "architecture.hidden=[16,16,16]", *QUICK[2:], "block_structure=e-kfac")
    owners = support.run(tmp_path / "owners", *options, *FSDP, "precond_shard=blocks")
    assert_alike(owners, support.run(tmp_path / "one", *options), 1e-12)


def test_a_step_leaves_the_state_where_it_lies():
    """A step by itself may return it elsewhere: the compiler decides."""
    config = support.config("experiment=quick-local-test", *QUICK[1:], *FSDP)
    job = prepare(config)
    assert job.layout is not None
    state = begin(job.recipe, job.task.params, job.task.statistics, job.layout)
    onto = shardings(job.recipe, job.layout, state)
    stream = job.task.material.streams.training(config, job.share)
    batch = job.join(next(stream))
    stream.close()
    after, _ = train_step(job.task.training, job.recipe, False, state, batch, layout=job.layout)
    spread = 0
    for array, where in zip(jax.tree.leaves(after), jax.tree.leaves(onto), strict=True):
        assert array.sharding.is_equivalent_to(where, array.ndim)
        spread += not where.is_fully_replicated
    # Two matrices, and of P two sides and a spectrum of each.
    assert spread == 2 + 2 * 3


def test_a_refit_leaves_the_state_where_it_lies(tmp_path):
    """What it learns comes out where the compiler wants it: of biases, in halves."""
    options = ("block_structure=diagonal", "precond_batch_size=8", "mesh.tensor=2")
    job = prepare(support.config("experiment=quick-local-test", *QUICK[1:], *options))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, print)
    session = open_session(job, origin(job, False, tmp_path, checkpoints, print), tmp_path, print)
    desk = Desk(
        Display(1, 1, quiet=True), Trackers(print), Clock(), checkpoints, Interrupts(), tmp_path
    )
    before = session.state.opt_state
    phases.refit(job, session, job.join(next(session.stream)), desk)
    session.stream.close()
    session.refits.close()
    after = session.state.opt_state
    assert int(llqr.find(after).refit.refits) == 1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


WAYS = {
    "micro-batches, SAM in groups": (
        "batch_size=32", "grad_acc_steps=2", "sam_mode=past_fsam", "sam_mode=base_fsam",
        "sam_groups=2", "perturb_mode=ema_precond_grad", "main_optimizer=polyak",
        "record_histograms=true", "partial_batch=pad",
    ),
    # With sides, rounding chooses the basis where the first moments have rank to spare.
    "streaming": (
        "block_structure=diagonal", "method=streaming", "precond_stream_every=2",
        "learning_rate=0.01",
    ),
    "exact steps": (
        "method=exact", "exact_momentum=0.5", "batch_size=32", "architecture.hidden=[4]",
    ),
    "many refit batches": ("multibatch_training=true", "precond_solver=adam"),
    "chunks": (
        "llqr_batch_update_mode=chunked_lqr_segment", "llqr_batch_update_chunk_size=16",
    ),
    "exact steps beside it": ("quality=[kfac]", "divergence=gauss_newton", "damping=0.1"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_has_the_numbers_of_one_device(tmp_path, way):
    plain = support.run(tmp_path / "one", *QUICK, *WAYS[way])
    exact = {"quality=[kfac]", "method=exact"} & {*WAYS[way]}
    within = 1e-8 if exact else 1e-11  # by an ill-conditioned solve
    assert_alike(support.run(tmp_path / "two", *QUICK, *WAYS[way], *FSDP), plain, within)


@pytest.mark.slow
def test_half_precision_trains_alike(tmp_path):
    options = (*QUICK, "precision=bf16")
    plain = support.run(tmp_path / "one", *options)
    assert_alike(support.run(tmp_path / "two", *options, *FSDP), plain, 0.05)


SMALL = (
    "precision=float64", "main_optimizer=adam", "learning_rate=0.02", "logging_freq=1",
    "precond_steps=2", "precond_batch_size=4", "precond_lr=0.01", "block_structure=diagonal",
    "max_steps=5", "test_eval_freq=3", "update_preconditioner_every=4",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["translation", "text"])
def test_sequences_have_the_numbers_of_one_device(tmp_path, kind):
    """Batches of three rows are filled up to four; beams and BLEU are the same."""
    options = (*TEXT, f"dataset.dataset_dir={sequence_files.text(tmp_path / 'data')}")
    if kind == "translation":
        options = (
            *TRANSLATION, f"dataset.dataset_dir={sequence_files.pairs(tmp_path / 'data')}",
            "translation_eval.enabled=true", "translation_eval.beam_size=2", "eval_batch_size=3",
        )  # fmt: skip
    options = (*options, *SMALL, "batch_size=4")
    plain = support.run(tmp_path / "one", *options)
    assert_alike(support.run(tmp_path / "two", *options, *FSDP), plain, 1e-11)
    if kind == "translation":
        said = [(tmp_path / run / "translations.jsonl").read_text() for run in ("one", "two")]
        assert said[0] == said[1]


def test_a_forecast_says_what_each_device_holds(capsys):
    """For a mesh that need not be there."""
    options = ("architecture.hidden=[256,256]", "block_structure=kfac", "plan_memory=false")
    options = ("experiment=quick-local-test", *options)
    forecast.show(support.config(*options))
    assert "per device" not in capsys.readouterr().out
    forecast.show(support.config(*options, "mesh.fsdp=8"))
    said = " ".join(capsys.readouterr().out.split())
    assert "devices 8: data 1 x fsdp 8 x tensor 1" in said
    # Matrices in eight parts and whole biases; five sides in parts, one of 10 x 10 that eight
    # does not divide, and the diagonals of the biases.
    biases = 256 + 256 + 10
    held = (64 * 256 + 256 * 256 + 256 * 10) / 8 + biases
    p = (64**2 + 4 * 256**2) / 8 + 10**2 + biases
    told = f"parameters {4 * held / 2**20:.2f} MiB, optimizer 0 B, P {4 * p / 2**20:.2f} MiB"
    assert f"per device {told}" in said


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size=33 does not divide over 2 devices .* of 2"):
        support.run(tmp_path / "run", *QUICK, *FSDP, "batch_size=33")
    with pytest.raises(ConfigError, match="batch_size=6 in sam_groups=2 does not divide over 2"):
        support.run(
            tmp_path / "run", *QUICK, *FSDP, "batch_size=6", "sam_groups=2", "sam_mode=base_sam"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mesh", "why"),
    [
        (("mesh.data=4",), "mesh.data=4, mesh.fsdp=1, mesh.tensor=1: 4 devices, and there are 2"),
        (("mesh.data=null", "mesh.fsdp=3"), "3 does not divide the 2 devices that are here"),
    ],
)
def test_a_mesh_that_is_not_there_is_refused(tmp_path, mesh, why):
    with pytest.raises(ConfigError, match=why):
        support.run(tmp_path / "run", *QUICK, *mesh)


# --- rows of batches --------------------------------------------------------------------------

HALF, QUARTERS = Share(2, (1,)), Share(4, (0, 3))


@pytest.mark.parametrize("share", [HALF, QUARTERS], ids=["half", "quarters"])
@pytest.mark.parametrize("partial", ["straddle", "pad"])
def test_a_share_of_a_batch_is_as_in_the_whole(share, partial):
    """Random numbers are drawn for all rows, so that a batch is the same on any devices."""
    augment = cifar_augmentation(0.5, 0.5, pad=1, cutout=2)
    source = data.Source.of(data.load("digits"), "train", augment)
    options = {"batch_size": 8, "seed": 3, "partial": partial, "num_threads": 0}
    whole, part = (
        data.train_stream(source, **options),
        data.train_stream(source, **options, share=share),
    )
    for _ in range(3):
        expected, found = next(whole), next(part)
        assert found.keys() == expected.keys()
        for name, rows in found.items():
            np.testing.assert_array_equal(rows, expected[name][share.rows(8)])
    assert part.get_state() == whole.get_state()
    ordered = data.evaluation_batches(source, 8), data.evaluation_batches(source, 8, share=share)
    for expected, found in zip(*ordered, strict=True):
        np.testing.assert_array_equal(found["mask"], expected["mask"][share.rows(8)])
        np.testing.assert_array_equal(found["image"], expected["image"][share.rows(8)])


def test_the_devices_hold_the_rows_of_a_batch():
    found = arrange(1, 2, 1)
    assert found is not None
    rows = np.arange(12.0).reshape(4, 3)
    joined = found.join({"x": rows})["x"]
    np.testing.assert_array_equal(joined, rows)
    pieces = {tuple(np.asarray(s.data)[:, 0]) for s in joined.addressable_shards}
    assert pieces == {(0.0, 3.0), (6.0, 9.0)}
    assert not found.put(rows).is_fully_replicated
    assert found.put(rows[:3]).is_fully_replicated, "three rows divide over no two devices"


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((4, 16, 6), (None, "fsdp", None)), ((8, 8), ("fsdp", None)), ((3, 8), (None, "fsdp"))],
)
def test_a_parameter_is_spread_along_its_longest_axis(shape, spec):
    """The first of those that are as long, and only one that the devices divide."""
    layout = arrange(1, 2, 1)
    assert layout is not None
    assert tuple(layout.parameter(shape).spec) == spec


def test_rows_are_filled_up_until_they_divide_over_the_devices():
    job = prepare(support.config("experiment=quick-local-test", *FSDP))
    assert [job.multiple(rows) for rows in (1, 2, 33)] == [2, 2, 34]


def test_rows_behind_another_axis_are_spread_along_their_own():
    """A batch for every inner step of a refit: [steps, rows, ...]."""
    layout = arrange(1, 2, 1)
    assert layout is not None
    stacked = np.arange(24.0).reshape(3, 4, 2)
    put = layout.put({"x": stacked, "of all": np.arange(3.0)}, axis=1)
    np.testing.assert_array_equal(put["x"], stacked)
    pieces = sorted(np.asarray(s.data)[0, 0, 0] for s in put["x"].addressable_shards)
    assert pieces == [stacked[0, 0, 0], stacked[0, 2, 0]]
    assert put["of all"].is_fully_replicated


# --- checkpoints ------------------------------------------------------------------------------


def spread(shape: tuple[int, ...], layout: Layout | None) -> jax.Array:
    array = jnp.arange(float(np.prod(shape))).reshape(shape)
    return array if layout is None else layout.place(array, layout.parameter(shape))


LAYOUTS = {"fsdp": (1, 2, 1), "tensor": (1, 1, 2), "one": (1, 1, 1)}


@pytest.mark.parametrize("there", ["fsdp", "tensor"])
@pytest.mark.parametrize("here", LAYOUTS)
def test_a_checkpoint_in_pieces_is_read_onto_any_devices(tmp_path, there, here):
    written = arrange(*LAYOUTS[there])
    state = {"w": spread((4, 6), written), "n": spread((3,), written)}
    checkpoints = Checkpoints(tmp_path, 1, print)
    checkpoints.save(1, state, {})
    state = jax.tree.map(lambda x: x * 0, state)
    checkpoints.close()
    _, meta = checkpoint.read(tmp_path, 1)
    pieces = {"fsdp": {"0:4,0:3", "0:4,3:6"}, "tensor": {"0:4,0:3", "0:4,3:6"}}[there]
    assert set(meta["checksums"]["0001.w"]) == pieces
    layout = arrange(*LAYOUTS[here])
    like = {"w": spread((4, 6), layout), "n": spread((3,), layout)}
    found = Checkpoints(tmp_path, 1, print).restore(like)
    assert found is not None
    for name, array in like.items():
        np.testing.assert_array_equal(found.state[name], array)
        assert found.state[name].sharding == array.sharding


def test_a_piece_that_is_another_is_named(tmp_path, monkeypatch):
    layout, said = arrange(1, 2, 1), []
    checkpoints, sums = Checkpoints(tmp_path, 1, said.append), checkpoint._checksum
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksum", lambda x: sums(x) + int(x.flat[0] == 12))
        checkpoints.save(1, {"w": spread((4, 3), layout)}, {})
        checkpoints.save(2, {"w": spread((6, 4), layout)}, {})
        checkpoints.close()
    assert checkpoints.restore({"w": spread((6, 4), layout)}) is None
    assert "the checkpoint of step 2 is damaged (0000.w, in its part 3:6,0:4," in said[0]


def test_the_format_before_is_still_read(tmp_path, monkeypatch):
    """One checksum for an array, which was written whole."""
    checkpoints = Checkpoints(tmp_path, 1, print)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 1)
        patch.setattr(
            checkpoint, "_checksums", lambda a: {k: checkpoint._checksum(v) for k, v in a.items()}
        )
        checkpoints.save(1, {"w": jnp.ones((4, 2))}, {})
        checkpoints.close()
    layout = arrange(1, 2, 1)
    found = checkpoints.restore({"w": spread((4, 2), layout)})
    assert found is not None
    np.testing.assert_array_equal(found.state["w"], np.ones((4, 2)))
