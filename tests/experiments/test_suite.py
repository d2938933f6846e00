"""The benchmark suite: its protocol, its counts, a run in small that is killed and goes on."""

import doctest
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.suite import (
    agenda,
    diagnosis,
    methods,
    pace,
    plots,
    protocol,
    runner,
    statistics,
    store,
    summary,
    targets,
)
from benchmarks.suite import report as reports
from benchmarks.suite.methods import wrappers
from benchmarks.suite.methods.method import Method
from benchmarks.suite.store import Setting
from benchmarks.suite.training import compiled, trial
from benchmarks.suite.workloads import mnist1d, networks
from benchmarks.suite.workloads.problem import Workload, cross_entropy

ROOT = Path(__file__).parents[2]
SMOKE, QUICK, FULL = (protocol.TIERS[name] for name in ("smoke", "quick", "full"))
CHOSEN = "SGD Nesterov,AdamW,LLQR streaming"


@pytest.mark.parametrize(
    "name", ["methods", "protocol", "release", "statistics", "tables", "targets", "workloads"]
)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"benchmarks.suite.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


# --- the protocol -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.METHODS.values(), ids=lambda m: m.name)
def test_every_method_declares_a_search_of_the_same_size(method):
    assert len(method.alternatives) == 3
    if method.rate is not None:
        assert len(set(FULL.grid(method.rate))) == FULL.rates
        assert set(QUICK.grid(method.rate)) <= set(FULL.grid(method.rate))
        assert QUICK.grid(method.rate)[0] == method.rate


def tune(tier, method, loss):
    """Tune by a loss of (rate, alternative); return what is chosen, and how many were tried."""
    found = {}
    while (due := agenda.next_tuning(tier, method, "train", found.get)) is not None:
        value = loss(due.rate, due.alternative)
        found[due] = {"columns": {"train": [1.0, value if math.isfinite(value) else None]}}
    return agenda.best(tier, method, "train", found.get), len(found)


METHOD = Method("m", lambda workload: None, 0.1, {}, ({"a": 1}, {"a": 2}, {"a": 3}))


def test_tuning_takes_the_best_rate_and_then_the_best_alternative():
    def loss(rate, alternative):
        if rate > 0.6:
            return math.inf
        return abs(math.log(rate / 0.3)) + (0.0 if alternative == 1 else 0.1)

    assert tune(QUICK, METHOD, loss) == (Setting(0.316, protocol.TUNING_SEED), 7)
    assert tune(FULL, METHOD, loss) == (Setting(0.305, protocol.TUNING_SEED, 1), 16)


@pytest.mark.parametrize("ideal", [0.0005, 0.004, 0.02, 0.1, 0.4, 2.0, 20.0])
def test_rates_go_on_beyond_an_end_and_refine_within(ideal):
    found = {}

    def loss(rate, alternative):
        found[rate] = abs(math.log(rate / ideal))
        return found[rate]

    chosen, tried = tune(QUICK, METHOD, loss)
    assert tried == len(found) == 7
    assert chosen.rate == min(found, key=lambda rate: found[rate])
    # A grid from 0.01 to 1 and two steps of half a decade more on either side.
    edge = agenda.at_the_edge(found, chosen)
    assert edge == (not 0.003 < ideal < 3)
    apart = abs(math.log10(chosen.rate / ideal))
    if not edge:
        assert apart < 0.26  # half a step of the grid at most
    if 0.03 < ideal < 0.3:
        assert apart < 0.07  # twice refined


def test_where_all_diverge_smaller_rates_are_tried():
    tried = set()
    tune(QUICK, METHOD, lambda rate, _: tried.add(rate) or math.inf)
    assert min(tried) < 0.0011


def test_what_is_compared_never_saw_the_tuning_seed():
    get = {Setting(0.1, protocol.TUNING_SEED): {"columns": {"train": [1.0, 0.5]}}}.get
    seeds = [s.seed for s in agenda.compared(FULL, METHOD, "train", get)]
    assert seeds == list(range(10))
    assert protocol.TUNING_SEED not in seeds


def test_a_rate_that_is_something_else_has_no_schedule():
    shape = {"decays": False, "warms": False}
    assert {protocol.multiplier(step, 40, **shape) for step in range(40)} == {1.0}
    assert protocol.multiplier(0, 40) == 0.5


def test_cost_of_a_target():
    run = {"gradients": [0, 10, 20, 30], "train": [1.0, 0.5, 0.6, None]}
    assert statistics.cost(run, 0.5, "gradients", "train") == 10
    assert statistics.cost(run, 0.5**0.5, "gradients", "train") == pytest.approx(5)
    assert statistics.cost(run, 0.4, "gradients", "train") == math.inf


def test_a_win_needs_the_threshold():
    theirs = {seed: 1.0 + 0.01 * seed for seed in range(5)}
    twice = {seed: 0.5 * loss * (1 + 0.01 * (-1) ** seed) for seed, loss in theirs.items()}
    assert statistics.verdict(statistics.margin(twice, theirs)) == "ahead"
    assert statistics.verdict(statistics.margin(theirs, twice)) == "behind"
    noisy = {seed: loss * (0.5 if seed % 2 else 1.9) for seed, loss in theirs.items()}
    assert statistics.verdict(statistics.margin(noisy, theirs)) == "level"
    assert statistics.margin({0: 1.0, 1: 2.0}, {0: math.inf, 1: 1.0}) == math.inf
    # By hand: logs 0.1 and 0.3, mean 0.2, standard deviation 0.1414.
    pair = {0: math.exp(-0.1), 1: math.exp(-0.3)}
    assert statistics.margin(pair, {0: 1.0, 1: 1.0}) == pytest.approx(2.0)


def test_bootstrap_interval_covers():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(40):
        _, low, high = statistics.interval(rng.normal(size=20), np.mean)
        hits += low <= 0 <= high
    assert 32 <= hits <= 40


# --- what is counted ----------------------------------------------------------------------------

CALLS = []


def counting(params, batch):
    jax.debug.callback(lambda: CALLS.append(1))
    return networks.perceptron(params, batch["image"], activation=jnp.tanh)


def tiny(**changes):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(32, 6)).astype(np.float32)
    data = {"image": image, "label": (image[:, 0] > 0).astype(np.int32)}
    parameters = partial(networks.perceptron_parameters, widths=(6, 8, 2))
    made = Workload("tiny", parameters, lambda p, b: networks.perceptron(p, b["image"]),
                    cross_entropy, data, data, data, batch=32, steps=12)  # fmt: skip
    return replace(made, **changes)


@pytest.mark.parametrize("name", ["AdamW", "SAM", "L-BFGS"])
def test_gradient_evaluations_are_counted(name):
    program = compiled(tiny(forward=counting), methods.METHODS[name])
    CALLS.clear()
    columns = trial(program, 0.01, 0, 1)
    jax.effects_barrier()
    evaluations = 2 * 2  # at the start and at the end, on both sets
    done, counted = len(CALLS) - evaluations, columns["gradients"][-1]
    if name == "L-BFGS":
        assert counted >= 12  # the budget of the others' steps
    assert done == counted


def test_refits_are_counted():
    method = methods.METHODS["LLQR streaming"]
    columns = trial(compiled(tiny(steps=40), method), 0.05, 0, 4)
    # A quarter of one more in each of the first ten steps, and in every tenth after.
    assert columns["step"] == [0, 10, 20, 30, 40]
    assert columns["gradients"] == [0, 12.5, 22.75, 33, 43.25]
    assert columns["train"][-1] < 0.7 * columns["train"][0]


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SOAP", "LLQR streaming"])
def test_wrappers_go_around_any_method(name):
    method = methods.METHODS[name]
    build = wrappers.averaged(wrappers.ema_nesterov(method.build))
    workload = tiny(steps=40)
    plain = trial(compiled(workload, method), 0.05, 0, 4)
    found = trial(compiled(workload, replace(method, build=build)), 0.05, 0, 4)
    assert found["gradients"] == plain["gradients"]
    assert found["train"][-1] < 0.7 * found["train"][0]
    # A share of 0.01 is the last step alone, and without a decay there is nothing to look from.
    same = replace(method, build=build, options={**method.options, "share": 0.01, "decay": 0.0})
    again = trial(compiled(workload, same), 0.05, 0, 4)
    np.testing.assert_allclose(again["train"], plain["train"], rtol=1e-2)


def test_a_wrapper_takes_no_refits_from_outside():
    build = wrappers.averaged(methods.METHODS["LLQR probe"].build)
    with pytest.raises(ValueError, match="outside"):
        build(tiny(), **methods.METHODS["LLQR probe"].options)


@pytest.mark.parametrize("name", ["MuonH", "AdamH"])
def test_kernels_keep_their_norms_on_a_sphere(name):
    workload, method = tiny(steps=40), methods.METHODS[name]
    engine = method.build(workload, **{**method.options, "head": True})
    step, stream = jax.jit(engine.step("plain")), workload.batches(0)
    carry = engine.start(workload.initial(0), next(stream), jax.random.key(0))
    before = carry[0]
    for _ in range(workload.steps):
        carry = step(carry, next(stream), 0.05)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(carry[0]), strict=True):
        assert float(jnp.abs(new - old).max()) > 0.01
        if old.ndim > 1:
            np.testing.assert_allclose(jnp.linalg.norm(new), jnp.linalg.norm(old), rtol=1e-5)


def test_a_run_that_diverges_ends():
    method = methods.METHODS["SGD Nesterov"]
    columns = trial(compiled(tiny(steps=40), method), 1e30, 0, 4)
    assert columns["train"][-1] is None
    assert len(columns["train"]) < 5


# --- a run in small -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("suite"), []
    workload = tiny(steps=40)
    runner.run(workload, methods.choose(CHOSEN), SMOKE, folder, say=said.append, command="smoke")
    return folder, workload, said


def kept(folder, method, workload="tiny"):
    """What is on disk of a method."""
    return store.read(folder, workload)[store.METHODS][method]


def test_stages_follow_one_another_and_methods_take_turns(ran):
    _, _, said = ran
    who = [line.split(", ")[1].split(":")[0] for line in said if "rate" in line]
    first, second, ours = CHOSEN.split(",")
    assert who[:8] == [first, second] * 4
    assert "targets" in said[8]
    assert who[8:12] == [ours] * 4
    assert who[12:] == [first, second, ours] * 2


def test_what_is_there_is_not_run_again(ran):
    folder, workload, _ = ran
    said = []
    runner.run(workload, methods.choose(CHOSEN), SMOKE, folder, say=said.append)
    assert said == []


def test_a_broken_run_goes_on_with_the_same_numbers(ran):
    folder, workload, _ = ran
    record = kept(folder, "AdamW")
    lost = record["trials"].pop()
    store.keep(folder, "tiny", store.METHODS, "AdamW", value=record)
    said = []
    runner.run(workload, methods.choose(CHOSEN), SMOKE, folder, say=said.append)
    again = kept(folder, "AdamW")["trials"][-1]
    assert len(said) == 1
    assert again["columns"]["train"] == lost["columns"]["train"]


def test_a_write_that_is_killed_leaves_the_old_file(ran, monkeypatch):
    folder, _, _ = ran
    path = store.place(folder, "tiny")
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.keep(folder, "tiny", store.METHODS, "AdamW", value={"half": 1})
    assert path.read_text() == before


def test_what_several_write_at_once_is_all_kept(tmp_path):
    names = [f"method {number}" for number in range(6)]

    def record(trials):
        return {"trials": [{"n": n} for n in range(trials)]}

    def write(name):
        for trials in range(1, 5):
            store.keep(tmp_path, "tiny", store.METHODS, name, value=record(trials))

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(write, names))
    store.keep(tmp_path, "tiny", targets.SECTION, value={"hard": 1e-3})
    found = store.read(tmp_path, "tiny")
    assert found[store.METHODS] == {name: record(4) for name in names}
    assert found[targets.SECTION] == {"hard": 1e-3}
    text = store.place(tmp_path, "tiny").read_text()
    assert text.count('\n{"n":3}') == len(names), "a line for each trial"
    assert not list(tmp_path.glob("*.new"))


def test_other_settings_make_results_void(ran):
    folder, workload, _ = ran
    method = methods.METHODS["AdamW"]
    other = replace(method, options={**method.options, "b1": 0.5})
    found = store.Trials(folder, workload, other)
    assert (found.record["trials"], found.dropped) == ([], 6)


def test_targets_are_fixed_before_ours_and_never_again(ran, tmp_path):
    folder, workload, _ = ran
    fixed = targets.read(folder, "tiny")
    assert fixed is not None
    assert set(fixed["baselines"]) == {"SGD Nesterov", "AdamW"}
    assert fixed["best"] == min(fixed["baselines"].values())
    trials = {m: store.Trials(folder, workload, m) for m in methods.choose(CHOSEN)}
    assert targets.fix(folder, workload, SMOKE, trials) == fixed
    with pytest.raises(RuntimeError, match="LLQR has run"):
        targets.fix(tmp_path, workload, SMOKE, trials)
    only = {m: t for m, t in trials.items() if m.ours}
    for of in only.values():
        of.record["trials"] = []
    with pytest.raises(RuntimeError, match="ask for baselines too"):
        targets.fix(tmp_path, workload, SMOKE, only)


def test_one_process_at_a_time(ran):
    folder, workload, _ = ran
    with (
        store.alone(folder, "tiny"),
        pytest.raises(RuntimeError, match="another process"),
    ):
        runner.run(workload, methods.choose(CHOSEN), SMOKE, folder)


def test_the_command_goes_on_where_it_was_killed(tmp_path):
    command = [sys.executable, "-m", "benchmarks.suite", "run", "digits", "--tier", "smoke",
               "--methods", "SGD Nesterov,AdamW", "--out", str(tmp_path),
               "--jobs", "1"]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()  # of the first trial
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) < 13  # 12 trials and the targets, if all were run here
    for name in ("SGD Nesterov", "AdamW"):
        trials = kept(tmp_path, name, "digits")["trials"]
        assert len(trials) == 6
        assert len({(t["rate"], t["seed"]) for t in trials}) == 6
    assert targets.read(tmp_path, "digits") is not None


def test_report(ran):
    folder, _, _ = ran
    page = reports.write(["tiny"], methods.choose(CHOSEN), SMOKE, folder)
    assert page is not None
    text = page.read_text()
    result = summary.read(folder, "tiny", methods.choose(CHOSEN), SMOKE)
    assert result is not None
    for name in CHOSEN.split(","):
        assert f"| {name} |" in text
    mean = np.mean(list(result.ends("AdamW").values()))
    assert f"{mean:.4g} ±" in text
    assert {p.name for p in (folder / "images").iterdir()} == {
        "profiles.png", "curves.png", "rates.png"
    }  # fmt: skip
    costs = summary.ratios([result], "gradients", "AdamW")
    assert costs["AdamW"] == (1.0, 3)


def test_the_first_page_shows_workloads_that_have_all_its_methods(tmp_path):
    every = methods.choose("")
    read = partial(summary.read, ROOT / "benchmarks" / "results" / "suite", tier=QUICK)
    results = [read(name=name, methods=every) for name in ("poisson", "mnist1d")]
    assert plots.first_page(results, tmp_path / "both.png") == ["mnist1d", "poisson"]
    assert (tmp_path / "both.png").exists()
    without = read(name="poisson", methods=methods.choose("AdamW,SOAP,LLQR streaming"))
    assert plots.first_page([without], tmp_path / "none.png") == []
    assert not (tmp_path / "none.png").exists()


def test_what_is_not_reached_counts_twice_what_was_spent(ran):
    folder, _, _ = ran
    result = summary.read(folder, "tiny", methods.choose(CHOSEN), SMOKE)
    assert result is not None
    result.fixed["targets"] = {"never": 1e-30}
    longest = {name: max(e.last("gradients")) for name, e in result.entries.items()}
    assert longest["LLQR streaming"] > longest["AdamW"]
    for name in result.entries:
        most = max(longest[name], longest["AdamW"])
        assert result.counted(name, "never", "gradients", "AdamW") == 2 * most
    costs = summary.ratios([result], "gradients", "AdamW")
    assert costs["SGD Nesterov"] == (1.0, 1)
    assert costs["LLQR streaming"][0] == longest["LLQR streaming"] / longest["AdamW"]


def test_seconds_are_those_of_the_fastest_trial(ran):
    folder, _, _ = ran
    result = summary.read(folder, "tiny", methods.choose(CHOSEN), SMOKE)
    assert result is not None
    trials = kept(folder, "AdamW")["trials"]
    fastest = min(t["columns"]["seconds"][-1] / t["columns"]["gradients"][-1] for t in trials)
    gradients = np.asarray(result.costs("AdamW", "easy", "gradients"))
    assert np.isfinite(gradients).any()
    np.testing.assert_allclose(result.costs("AdamW", "easy", "seconds"), fastest * gradients)
    compilation = min(t["compilation"] for t in trials)
    every = result.costs("AdamW", "easy", "all seconds")
    np.testing.assert_allclose(every, fastest * gradients + compilation)


def test_seconds_are_those_of_one_process_where_it_has_measured_them(ran, tmp_path):
    folder, workload, _ = ran
    shutil.copy(store.place(folder, workload.name), tmp_path)
    read = partial(summary.read, tmp_path, workload.name, methods.choose(CHOSEN), SMOKE)
    before, usual, ours = read(), "AdamW", "LLQR streaming"
    timed = pace.timed(workload, methods.choose(f"{usual},{ours}"), repeats=1)
    assert {kind: len(times) for kind, times in timed[ours].times.items()} == {
        "plain": 1,
        "refit": 1,
    }
    assert timed[ours].kinds.count("refit") == 13  # of 40: 0 to 9, 10, 20, 30
    measured = {pace.STEP: {usual: 2.0, ours: 5.0}, pace.COMPILATION: {usual: 1.0, ours: 3.0}}
    store.keep(tmp_path, workload.name, pace.SECTION, value=measured)
    after = read()
    old, new = (r.entries[usual] for r in (before, after))
    assert (old.pace, old.compilation) == pytest.approx((new.pace, new.compilation))
    entry = after.entries[ours]
    spent = entry.last("gradients")[0] / entry.last("step")[0]
    assert entry.pace * spent == pytest.approx(2.5 * new.pace)
    assert entry.compilation == pytest.approx(3 * new.compilation)
    other = "SGD Nesterov"
    assert after.entries[other].pace == before.entries[other].pace


# --- what is trained ----------------------------------------------------------------------------


def test_jets_are_the_derivatives():
    params = networks.perceptron_parameters(jax.random.key(0), widths=(2, 5, 4, 1))
    x = jax.random.normal(jax.random.key(1), (3, 2))

    def u(point):
        return networks.perceptron(params, point[None], activation=jnp.tanh)[0, 0]

    value, first, second = networks.jets(params, x)
    np.testing.assert_allclose(value, jax.vmap(u)(x), rtol=1e-4)
    np.testing.assert_allclose(first, jax.vmap(jax.grad(u))(x), rtol=1e-3, atol=1e-5)
    hessian = jax.vmap(jax.hessian(u))(x)
    np.testing.assert_allclose(second, jnp.einsum("nii->ni", hessian), rtol=1e-3, atol=1e-4)


def test_mnist1d_is_balanced_and_standardised():
    train, test = mnist1d.generate()
    image = np.concatenate([train["image"], test["image"]])
    label = np.concatenate([train["label"], test["label"]])
    assert (train["image"].shape, test["image"].shape) == ((4000, 40, 1), (1000, 40, 1))
    assert np.bincount(label).tolist() == [500] * 10
    assert abs(image.mean()) < 1e-4
    assert image.std() == pytest.approx(1, abs=1e-4)
    # One draw: templates of a class are alike once they are moved back.
    again, _ = mnist1d.generate()
    np.testing.assert_array_equal(again["image"], train["image"])


# --- why ----------------------------------------------------------------------------------------


def test_conditioning_of_a_known_matrix():
    diagonal = {"a": jnp.array([8.0, 1.0, 1.0]), "b": jnp.array([1.0, 1.0])}
    found = diagnosis.conditioning(lambda x: jax.tree.map(jnp.multiply, diagonal, x), diagonal)
    assert found == pytest.approx(8 / (12 / 5), rel=1e-2)


@pytest.mark.slow
def test_streaming_conditions_the_curvature():
    found = diagnosis.diagnose(tiny(steps=40))
    assert found["steps"] == 40
    for at in (found["early"], found["end"]):
        assert at["conditioning after P"] < 0.5 * at["conditioning"]
        assert at["cosine"]["exact"] == pytest.approx(1, abs=1e-3)
        assert 0 < at["share"]["gradient"] <= 1.001
        assert 0 < at["share"]["streaming"] <= 1.001
    assert "behind P" in diagnosis.told(found)
