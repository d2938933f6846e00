"""The suite's test set: its workloads, what of LLQR is refused there, how it is told."""

import json
import math
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llqr
from benchmarks.suite import (
    __main__ as command,
)
from benchmarks.suite import (
    diagnosis,
    methods,
    pace,
    protocol,
    release,
    runner,
    store,
    summary,
    tables,
    targets,
    workloads,
)
from benchmarks.suite import report as reports
from benchmarks.suite.training import compiled, trial
from benchmarks.suite.workloads import held_out
from benchmarks.suite.workloads.held_out import networks, numeric
from benchmarks.suite.workloads.networks import block, perceptron, perceptron_parameters
from benchmarks.suite.workloads.problem import Workload, cross_entropy, take

SMOKE = protocol.TIERS["smoke"]
BASELINES = "AdamW,SGD Nesterov"
OURS = methods.METHODS["LLQR streaming"]
TOGETHER = {"graph"}
"""Workloads whose examples see each other."""


@pytest.fixture(params=held_out.MAKERS)
def workload(request):
    """Each of the set, in its precision."""
    with jax.enable_x64(request.param in workloads.FLOAT64):
        yield workloads.load(request.param)


def some(workload, count):
    return workload.train if workload.full_batch else take(workload.train, slice(count))


# --- what is trained ----------------------------------------------------------------------------


def test_two_sets_have_no_name_in_common():
    development, test = (set(workloads.SETS[name]) for name in ("development", "test"))
    assert not development & test
    assert len(test) >= 12
    assert not workloads.load("digits").held_out


def test_a_workload_starts_with_finite_numbers(workload):
    assert workload.held_out
    assert workload.name in held_out.MAKERS
    assert workload.told
    params, batch = workload.initial(0), some(workload, 4)
    wanted = np.dtype(np.float64 if workload.float64 else np.float32)
    assert {x.dtype for x in jax.tree.leaves(params)} == {wanted}
    loss, grads = jax.jit(jax.value_and_grad(workload.objective))(params, batch)
    assert math.isfinite(loss)
    assert loss > 0
    for path, x in jax.tree.leaves_with_path(grads):
        assert jnp.isfinite(x).all()
        assert jnp.any(x != 0) or "norm" in str(path) or "bias" in str(path), path


def test_what_is_measured_is_of_other_examples(workload):
    shapes = jax.eval_shape(workload.measured, workload.initial(0), workload.fixed, workload.test)
    assert {"train", "test"} <= set(shapes)
    integers = np.issubdtype(workload.train["label"].dtype, np.integer)
    assert ("accuracy" in shapes) == workload.classes == integers
    name = next(iter(workload.train))
    seen, tested = (np.asarray(x[name]) for x in (workload.fixed, workload.test))
    if workload.name in TOGETHER:
        assert not (workload.train["counts"] & workload.test["counts"]).any()
    elif workload.name != "wave":  # a grid inside and on the boundary, and one of the solution
        assert not any((tested == row).reshape(len(tested), -1).all(1).any() for row in seen[:20])


@pytest.mark.parametrize("workload", sorted(set(held_out.MAKERS) - TOGETHER), indirect=True)
def test_examples_do_not_see_each_other(workload):
    params, batch = workload.initial(0), take(workload.train, slice(4))
    both = workload.forward(params, batch)
    halves = [workload.forward(params, take(batch, s)) for s in (slice(2), slice(2, 4))]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *halves)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), both, joined)


def test_metrics_are_those_of_the_library(workload):
    metrics = llqr.metrics.resolve(workload.metric)
    outputs = jax.eval_shape(workload.forward, workload.initial(0), some(workload, 4))
    if isinstance(metrics, dict):
        assert metrics.keys() == outputs.keys()
    assert workload.metric in ("ngd", "gaussian") or isinstance(metrics, dict)


@pytest.mark.parametrize("name", ["table", "policy-distillation", "graph"])
def test_adamw_learns(name):
    workload = replace(workloads.load(name), steps=60)
    columns = trial(compiled(workload, methods.METHODS["AdamW"]), 1e-2, 0, 2)
    assert columns["test"][-1] < 0.6 * columns["test"][0]


def test_a_scan_over_layers_is_a_loop_over_them():
    make = partial(networks.scanned_parameters, vocabulary=5, width=8, depth=3, length=4)
    params, tokens = make(jax.random.key(0)), jnp.array([[0, 1, 2, 4], [3, 3, 1, 0]])
    x = params["tokens"]["embedding"][tokens] + params["positions"]["embedding"]
    for i in range(3):
        x = block(jax.tree.map(lambda a, i=i: a[i], params["layers"]), x, heads=2)
    expected = networks.affine(params["head"], networks.normalised(x, params["norm"]))
    np.testing.assert_allclose(networks.scanned(params, tokens, heads=2), expected, rtol=1e-4)


def test_a_flow_knows_its_volume():
    params = networks.flow_parameters(jax.random.key(0), dims=4, couplings=3, width=8)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    found = networks.flow(params, x)
    slopes = jax.vmap(jax.jacobian(lambda p: networks.flow(params, p[None])["z"][0]))(x)
    expected = jnp.log(jnp.abs(jnp.linalg.det(slopes)))
    np.testing.assert_allclose(found["volume"], expected, rtol=1e-3, atol=1e-4)


def test_the_density_to_learn_is_known():
    # Six normals that hardly touch: log 6 + the entropy of one. Bends keep volumes.
    label = workloads.load("real-nvp").train["label"]
    one = 2 * math.log(2 * math.pi * math.e * numeric._NARROW**2)
    assert -label.mean() == pytest.approx(math.log(6) + one, abs=0.05)


def test_a_node_hears_the_mean_of_its_neighbours():
    params = networks.graph_parameters(jax.random.key(0), widths=(3, 4, 2))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    senders, receivers = jnp.array([0, 1, 2, 4, 4]), jnp.array([1, 0, 1, 3, 0])
    heard = np.zeros((5, 5))
    for sender, receiver in zip(senders, receivers, strict=True):
        heard[receiver, sender] = 1
    heard /= np.maximum(heard.sum(1, keepdims=True), 1)
    first = networks.affine(params[0], x) + heard @ x @ params[0]["neighbours"]["kernel"]
    expected = networks.affine(params[1], jax.nn.silu(first))
    np.testing.assert_allclose(networks.graph(params, x, senders, receivers), expected, rtol=1e-4)


def test_labels_are_what_they_should_be():
    policy = workloads.load("policy-distillation").train
    np.testing.assert_allclose(policy["policy"].sum(1), 1, rtol=1e-5)
    likeliest = policy["policy"].max(1)
    np.testing.assert_array_equal(likeliest, policy["policy"][range(20_000), policy["label"]])
    assert np.bincount(policy["label"]).min() > 200  # each torque is best somewhere
    words = workloads.load("gru-words").train
    np.testing.assert_array_equal(words["tokens"][:, 1:], words["label"][:, :-1])
    assert words["tokens"].max() == 499
    order = workloads.load("scanned-transformer").train
    tokens = order["tokens"]
    np.testing.assert_array_equal(np.sort(tokens[:, :10], 1), order["label"][:, 10:])


def test_muon_takes_layers_in_a_scan_one_by_one():
    grads = {"kernel": jax.random.normal(jax.random.key(0), (3, 4, 5))}
    stacked = {"layers": grads}
    apart = {f"block{i}": {"kernel": grads["kernel"][i]} for i in range(3)}
    steps = []
    for tree in (stacked, apart):
        flat = tiny(parameters=lambda key, tree=tree: tree, forward=lambda p, b, tree=tree: sum(
            jnp.vdot(a, g) for a, g in zip(jax.tree.leaves(p), jax.tree.leaves(tree), strict=True)
        ), loss=lambda outputs, batch: outputs)  # fmt: skip
        engine = methods.METHODS["Muon"].engine(flat)
        carry = engine.start(tree, {}, None)
        steps.append(engine.parameters(engine.step("plain")(carry, {}, 0.1)))
    for i in range(3):
        np.testing.assert_allclose(
            steps[0]["layers"]["kernel"][i], steps[1][f"block{i}"]["kernel"], rtol=1e-4
        )


# --- accuracy -----------------------------------------------------------------------------------


def tiny(**changes):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(32, 6)).astype(np.float32)
    data = {"image": image, "label": (image[:, 0] > 0).astype(np.int32)}
    parameters = partial(perceptron_parameters, widths=(6, 8, 2))
    made = Workload("tiny", parameters, lambda p, b: perceptron(p, b["image"]), cross_entropy,
                    data, data, data, batch=32, steps=40, held_out=True)  # fmt: skip
    return replace(made, **changes)


def test_accuracy_is_of_the_rows_that_count():
    logits, batch = jnp.eye(3)[jnp.array([0, 1, 2, 0])], {"label": jnp.array([0, 1, 1, 1])}
    assert tiny().accuracy(logits, batch) == 0.5
    masked = tiny(mask=lambda batch: jnp.array([True, True, True, False]))
    assert masked.accuracy(logits, batch) == pytest.approx(2 / 3)


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def released(monkeypatch):
    monkeypatch.setattr(release, "_changes", lambda: "# Changelog\n\n## Unreleased\n\n## 0.2.0\n")


VARIANTS = {
    "as in development": OURS,
    "another option": replace(OURS, options={"refit": llqr.Streaming(every=5)}),
    "told to be released": replace(OURS, options={"damping": 1e-3}, released={"damping": 1e-3}),
    "another name": replace(OURS, name="LLQR mine", options=OURS.released),
    "another rate": replace(OURS, rate=0.1, options=OURS.released),
    "published": methods.METHODS["LLQR published"],
    "probe": methods.METHODS["LLQR probe"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_ours_are_refused_wherever_they_would_be_compiled(name, released):
    with pytest.raises(release.RefusedError, match="tiny is of the test set"):
        compiled(tiny(), VARIANTS[name])


@pytest.mark.parametrize("name", list(VARIANTS)[2:])  # of the others, options are the release's
def test_variants_of_ours_are_refused_before_anything_runs(name, released, tmp_path):
    said = []
    chosen = [*methods.choose(BASELINES), VARIANTS[name]]
    with pytest.raises(release.RefusedError, match=r"not run there|no method of the suite"):
        runner.run(tiny(), chosen, SMOKE, tmp_path, say=said.append)
    assert said == []
    assert not store.place(tmp_path, "tiny").exists()


def test_released_methods_run_at_their_defaults_without_a_second_setting(released):
    found = release.as_run(OURS, tiny())
    assert found.options == {"refit": llqr.Streaming()}
    assert found.alternatives == ()
    release.check(tiny(), found, None)
    with pytest.raises(release.RefusedError, match="no second setting"):
        release.check(tiny(), replace(found, alternatives=OURS.alternatives), 0)
    assert release.as_run(OURS, tiny(held_out=False)) is OURS
    for method in methods.choose("AdamW,SOAP"):
        assert release.as_run(method, tiny()) is method


def test_what_is_no_release_is_refused(monkeypatch):
    monkeypatch.setattr(release, "_changes", lambda: "## Unreleased\n\n- A change.\n\n## 0.2.0\n")
    with pytest.raises(release.RefusedError, match="unreleased changes"):
        release.as_run(OURS, tiny())
    monkeypatch.setattr(release, "_changes", lambda: "## 0.3.0\n\n- A change.\n")
    assert release.as_run(OURS, tiny()).options == OURS.released
    monkeypatch.setattr(release.llqr, "__file__", "/elsewhere/llqr/__init__.py")
    with pytest.raises(release.RefusedError, match="not from this checkout"):
        release.as_run(OURS, tiny())


def test_a_diagnosis_of_the_test_set_is_refused(released):
    with pytest.raises(release.RefusedError):
        diagnosis.diagnose(tiny(), steps=1)


@pytest.mark.parametrize("version", ["0.2.0", "0.10.1"])
def test_a_release_runs_once(version, released, monkeypatch, tmp_path):
    monkeypatch.setattr(release, "version", lambda: version)
    chosen, said = [*methods.choose(BASELINES), OURS], []
    run = partial(runner.run, tiny(steps=12), chosen, SMOKE, tmp_path, say=said.append)
    run()
    first = store.read(tmp_path, "tiny")
    record = first[f"release {version}"][OURS.name]
    assert record["settings"]["version"] == version
    assert record["settings"]["code"] == release.code()
    assert len(record["trials"]) == 6
    assert OURS.name not in first[store.METHODS]
    assert said[8].startswith("tiny: targets")
    said.clear()
    run()
    assert said == []
    if version != "0.2.0":
        return
    monkeypatch.setattr(release, "code", lambda: "other")
    with pytest.raises(release.RefusedError, match="with other code"):
        run()
    monkeypatch.setattr(release, "version", lambda: "0.3.0")
    run()
    both = store.read(tmp_path, "tiny")
    assert both["release 0.2.0"] == first["release 0.2.0"]
    assert len(said) == 6
    assert store.trials_of(tmp_path, "tiny")[OURS.name] == both["release 0.3.0"][OURS.name]


def test_commands_know_the_sets(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(runner, "run_all", lambda *given: asked.append(given) or [])

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["suite", *words])
        command.main()
        names, chosen = asked[-1][:2]
        return names, {method.name for method in chosen}

    monkeypatch.setattr(release, "_changes", lambda: "## Unreleased\n\n- A change.\n")
    names, chosen = call("run", "--set", "test")
    assert names == list(held_out.MAKERS)
    assert {"AdamW", "SOAP"} <= chosen
    assert not any(name.startswith("LLQR") for name in chosen)
    assert "unreleased changes" in capsys.readouterr().out
    monkeypatch.setattr(release, "_changes", lambda: "## 0.3.0\n")
    assert "LLQR streaming" in call("run", "wave")[1]
    assert "LLQR published" not in call("run", "wave")[1]
    names, chosen = call("run")
    assert names == list(workloads.MAKERS)
    assert chosen == set(methods.METHODS)
    for words, told in ((("wave", "digits"), "two sets"), (("--set", "all"), "unknown set"),
                        (("nothing",), "unknown workload")):  # fmt: skip
        with pytest.raises(SystemExit, match=told):
            call("run", *words)
    with pytest.raises(SystemExit, match="wave is of the test set"):
        call("diagnose", "wave")


# --- the report ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    runner.run(tiny(), methods.choose(BASELINES), SMOKE, folder, say=lambda line: None)
    return folder


def read(folder):
    result = summary.read(folder, "tiny", methods.choose(BASELINES), SMOKE)
    assert result is not None
    return result


def test_losses_and_accuracies_at_the_end(ran):
    result = read(ran)
    found = summary.generalisation([result], "AdamW")
    ends = {
        name: [t["columns"] for t in entry.runs.values()] for name, entry in result.entries.items()
    }
    for column in ("train", "test"):
        logs = [
            np.mean([math.log(run[column][-1]) for run in ends[n]]) for n in BASELINES.split(",")
        ]
        assert found["SGD Nesterov"][column] == pytest.approx([math.exp(logs[1] - logs[0])])
    shares = [np.mean([run["accuracy"][-1] for run in ends[n]]) for n in BASELINES.split(",")]
    assert found["SGD Nesterov"]["accuracy"] == pytest.approx([shares[1]])
    assert found["SGD Nesterov"]["gained"] == pytest.approx([shares[1] - shares[0]])
    assert found["AdamW"]["test"] == [1.0]
    ends["AdamW"][0]["test"][-1] = None  # diverged
    began = ends["AdamW"][0]["test"][0]
    assert result.entries["AdamW"].ended("test")[0] == began
    ends["AdamW"][1]["test"][-1] = 1e30
    assert result.entries["AdamW"].ended("test")[1] == ends["AdamW"][1]["test"][0]


def test_the_page_of_the_test_set(ran):
    page = reports.write(["tiny"], methods.choose(BASELINES), SMOKE, ran, "test")
    assert page is not None
    assert page.name == "benchmark-test.md"
    text = page.read_text()
    assert text.startswith("# Benchmark: results on the test set")
    assert "report --set test --tier smoke" in text
    assert "it has not run yet" in text
    assert "Wins and losses" not in text
    assert "| AdamW | 1.000 | 1.000 | 1 |" in text
    assert "test accuracy, %" in text
    assert "LLQR published" not in text
    assert "LLQR streaming" in text  # of what is not there


def test_results_without_accuracies_are_read(ran, tmp_path):
    record = json.loads(store.place(ran, "tiny").read_text())
    for kept in record[store.METHODS].values():
        for one in kept["trials"]:
            del one["columns"]["accuracy"]
    store.place(tmp_path, "tiny").write_text(json.dumps(record))
    result = read(tmp_path)
    assert "accuracy" not in tables.ends(result)
    assert "accuracy" in tables.ends(read(ran))
    assert "| AdamW | 1.000 | 1.000 | 1 |  |  |  |" in tables.at_the_end([result])
    trials = store.Trials(tmp_path, tiny(), methods.METHODS["AdamW"])
    assert trials.dropped == 0


def test_targets_of_the_test_set_are_fixed_from_baselines():
    for name in held_out.MAKERS:
        record = store.read(store.RESULTS, name)
        fixed = record.get(targets.SECTION)
        if fixed is not None:
            assert not any(methods.METHODS[method].ours for method in fixed["baselines"])
            assert fixed["measure"] == workloads.load(name).measure
        assert not any(methods.METHODS[m].ours for m in record.get(store.METHODS, {}))
    assert pace.METHODS
