"""The page that a person reads, and its picture: that of the documentation is drawn with it."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.suite import store
from benchmarks.suite.tables import markdown

from .methods import ENTRIES, MOST_LM, SHARE
from .trials import TIER

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = "equations-results.md", "errors.png"
IMAGES = "images/equations"
"""Where the documentation has the picture."""

STEPS = (20, 50, 100, 200)
"""Of the first table, beside the last step."""
TARGETS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

COLORS = {
    "exact": "C3", "exact cg": "C1", "LLQR streaming": "C4", "SOAP": "C2", "Muon": "C8",
    "AdamW": "C0", "L-BFGS": "C5", "AdamW then L-BFGS": "C9", "optimistix BFGS": "C6",
    "SSBroyden": "k", "optimistix LM": "C7", "SciPy trf": "navy",
}  # fmt: skip

AXES = ("seconds", "gradients")

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Result:
    """What is kept of a problem.

    Attributes:
      name: of the problem.
      problem: told, parameters, rows, seconds, gradient.
      methods: what is kept of each that has trials, in the order of tables.
    """

    name: str
    problem: dict[str, Any]
    methods: dict[str, dict[str, Any]]

    def runs(self, method: str) -> list[Columns]:
        """Return the columns of each seed."""
        return [trial["columns"] for trial in self.methods[method]["trials"]]


def read(folder: Path, names: Iterable[str], methods: Iterable[str]) -> list[Result]:
    """Return what is there of some problems and methods."""
    results, chosen = [], set(methods)
    for name in names:
        kept = store.read(folder, name)
        found = {
            method: kept["methods"][method]
            for method in ENTRIES
            if method in chosen and kept.get("methods", {}).get(method, {}).get("trials")
        }
        if found:
            results.append(Result(name, kept["problem"], found))
    return results


# --- figures ------------------------------------------------------------------------------------


def after(columns: Columns, step: int) -> float | None:
    """Return the error after a step, None where it was not measured or had diverged.

    >>> after({"step": [0, 10, 20], "error": [1.0, 0.1, None]}, 10)
    0.1
    """
    steps = columns["step"]
    return columns["error"][steps.index(step)] if step in steps else None


def reach(columns: Columns, target: float, axis: str) -> float:
    """Return where an error is first at most `target`; infinite if it never is.

    Between two measurements the logarithm of the error is taken to be linear in that of the axis;
    before the first, in the axis.

    >>> run = {"seconds": [0, 1, 100], "error": [1.0, 0.1, 0.001]}
    >>> round(reach(run, 0.01, "seconds"), 6), reach(run, 1e-9, "seconds")
    (10.0, inf)
    """
    places, errors = columns[axis], columns["error"]
    for i, error in enumerate(errors):
        if error is None:
            break
        if error <= target:
            if i == 0 or error <= 0:
                return float(places[i])
            before, low, high = errors[i - 1], places[i - 1], places[i]
            share = math.log(before / target) / math.log(before / error)
            return float(low * (high / low) ** share if low > 0 else share * high)
    return math.inf


def _spread(values: list[float]) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.1e}" if len(values) == 1 else f"{middle:.1e} ({low:.1e} - {high:.1e})"


def _errors(runs: list[Columns], step: int | None) -> str:
    """Errors of all seeds after a step; None: at the end."""
    found = [run["error"][-1] if step is None else after(run, step) for run in runs]
    finite = [x for x in found if x is not None]
    if len(finite) < len(found):
        if step is None:
            return f"{len(found) - len(finite)} of {len(found)} diverged"
        return ""
    return _spread(finite)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _reached(runs: list[Columns], target: float, axis: str) -> str:
    """The median, infinite values being larger than all others."""
    found = [reach(run, target, axis) for run in runs]
    middle, count = statistics.median_low(found), sum(map(math.isfinite, found))
    if math.isinf(middle):
        return f"{count} of {len(found)}" if count else ""
    return _number(middle) + (f" ({count} of {len(found)})" if count < len(found) else "")


# --- tables -------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """Return the errors after steps, and what a step and a trial took."""
    rows = []
    for name, kept in result.methods.items():
        runs = result.runs(name)
        steps = statistics.median(run["step"][-1] for run in runs)
        seconds = statistics.median(run["seconds"][-1] for run in runs)
        work = statistics.median(run["gradients"][-1] / max(1, run["step"][-1]) for run in runs)
        compilation = statistics.median(trial["compilation"] for trial in kept["trials"])
        rows.append([
            name, _chosen(kept), *(_errors(runs, step) for step in STEPS), _errors(runs, None),
            f"{steps:,.0f}", f"{seconds:.1f}", _number(work), f"{compilation:.1f}",
        ])  # fmt: skip
    head = ["method", "tuned", *(f"error after {n}" for n in STEPS), "at the end", "steps",
            "seconds", "gradients a step", "compilation, s"]  # fmt: skip
    return markdown(head, rows)


def _chosen(kept: dict[str, Any]) -> str:
    """What was tuned, as it was for the trials."""
    trial = kept["trials"][-1]
    if trial["rate"]:
        rates = [t["rate"] for t in kept["tuning"]]
        edge = ", at the end of the grid" if trial["rate"] in (min(rates), max(rates)) else ""
        return f"rate {trial['rate']:g}{edge}"
    if not kept["tuning"]:
        return ""
    return "memory 10" if trial["alternative"] is None else "memory 50"


def reached(result: Result, axis: str) -> str:
    """Return what errors take; nothing, if the first is reached by none."""
    targets = [
        target
        for target in TARGETS
        if any(_reached(result.runs(name), target, axis) for name in result.methods)
    ]
    if not targets:
        return ""
    rows = [
        [name, *(_reached(result.runs(name), target, axis) for target in targets)]
        for name in result.methods
    ]
    return markdown([f"{axis} to", *(f"{target:.0e}" for target in targets)], rows)


# --- the page -----------------------------------------------------------------------------------


def write(results: list[Result], folder: Path) -> Path | None:
    """Write the page of what is there, into the documentation if results are kept.

    Returns:
      The page, None if there is nothing to report.
    """
    if not results:
        print(f"nothing to report in {folder}: run first.")
        return None
    kept = folder.resolve().is_relative_to(DOCS.parent)
    if not kept:
        draw(results, folder / PICTURE)
    path = (DOCS if kept else folder) / PAGE
    path.write_text(page(results, f"{IMAGES}/{PICTURE}" if kept else PICTURE))
    print(f"written to {path}")
    return path


def page(results: list[Result], picture: str) -> str:
    """Return the page in Markdown."""
    parts = [
        "# Equations: results",
        "Written by `uv run python -m benchmarks.equations report`; do not edit. Networks that "
        "solve differential equations, in float64, by `llqr.exact(damping=llqr.Trust())` and by "
        "what one would take instead. The error is that of the solution, in L2, relative to it; "
        "medians of all seeds, with the least and the largest.",
        f"![Error against seconds]({picture})",
        _how(),
        _where(results),
    ]
    for result in results:
        parts += _section(result)
    return "\n\n".join(parts) + "\n"


def _how() -> str:
    return f"""\
- **exact** has the factorisation of a matrix, residuals x residuals or parameters x parameters,
  whichever is smaller (`solver="dual"` or `"primal"`); **exact cg** has none (`solver="cg"`).
  They have no rate; nothing of them is tuned.
- **Seconds**: all methods of a problem ran in one process, in turns, seed by seed. Compilation is
  told apart, evaluations stop the clock. All methods have the seconds that are told with each
  problem; **exact** makes a fixed number of steps, whose seconds are told. On poisson-runner and
  poisson-5d, exact, LLQR streaming, SOAP and AdamW were measured once more, together, after exact
  steps had got a Cholesky factor in place of eigenvectors: there these four stand beside each
  other, and exact's seconds elsewhere are those of eigenvectors.
- **Rates** are tuned by the error at the end on a seed that is used for nothing else: {TIER.rates}
  rates, a factor of ten around the customary one in both directions, and further ones as long as
  the best is at an end; on the larger problems in a quarter of the steps. The rate falls to 0 over
  as many steps as fit into the seconds.
- **L-BFGS** is optax's with its zoom line search, its memory (10 or 50) tuned likewise; before it
  **AdamW** makes {SHARE:.0%} of its steps in one row. **SSBroyden** is self-scaled Broyden with a
  zoom line search, from the package `ssbroyden-optimistix`; **optimistix BFGS** has that package's
  own line search by backtracking. A step of those two is one evaluation of a line search.
- **optimistix LM** is `LevenbergMarquardt`, which differentiates the residuals itself, stepped by
  `solver.step`, up to {MOST_LM:,} parameters. **SciPy trf** is `least_squares`, timed by its
  callback; its Jacobian is the gradient of each row under `vmap`, as ours, which is far faster than
  `jax.jacrev`. These two and **exact cg** have twice the seconds on the first two problems.
- **Gradients** are counted: one a step for first-order methods, a probe in addition, each call of
  a line search. Of the exact steps and the solvers for least squares they are seconds by those of
  one loss with its gradient, measured in the same process."""


def _where(results: list[Result]) -> str:
    """Return in which environments all of it was measured."""
    found: dict[str, dict[str, None]] = {}
    loads = []
    for result in results:
        for kept in result.methods.values():
            for where in kept["environments"]:
                versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
                machine = (
                    f"{where['platform']}, {where['cores used']} of {where['cores']} cores, Python "
                    f"{where['python']}, {versions}"
                )
                commit = (where.get("commit") or "not noted").removesuffix("-dirty")
                found.setdefault(machine, {})[commit] = None
                loads.append(where["load"])
    told = "; ".join(f"{machine}, commits {', '.join(of)}" for machine, of in found.items())
    return f"Measured on: {told}. Load when processes began: {min(loads)} to {max(loads)}."


def _section(result: Result) -> list[str]:
    given = result.problem
    seeds = sorted({len(result.runs(name)) for name in result.methods})
    points = "others in every step" if given["fresh"] else "all of them in every step"
    told, taken = given["told"], [found for axis in AXES if (found := reached(result, axis))]
    return [
        f"## {result.name}",
        f"{told[0].upper()}{told[1:]}: {given['parameters']:,} parameters, {given['rows']:,} rows, "
        f"{points}. {given['seconds']:g} seconds a trial; a gradient takes "
        f"{1e3 * given['gradient']:.2g} ms. Seeds: {' to '.join(map(str, seeds))}.",
        table(result),
        *(
            ["Medians of what an error takes; where not all seeds reach it, how many do."]
            if taken
            else []
        ),
        *taken,
    ]


# --- the picture --------------------------------------------------------------------------------


def draw(results: list[Result], path: Path) -> None:
    """Draw error against seconds: a panel for each problem, medians, all seeds between."""
    if not results:
        return
    height = math.ceil(len(results) / 2)
    figure = Figure(figsize=(8.4, 3.1 * height + 0.7), layout="constrained")
    panels = figure.subplots(height, 2, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for axes, result in zip(panels, results, strict=False):
        for name in result.methods:
            places, errors = curve(result.runs(name))
            color, ours = COLORS[name], name.startswith("exact")
            lines[name] = axes.plot(
                places, np.median(errors, axis=0), color=color, lw=2.2 if ours else 1.2
            )[0]
            axes.fill_between(places, errors.min(0), errors.max(0), color=color, alpha=0.12, lw=0)
        axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative error")
        axes.set_title(result.name, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(results) :]:
        axes.remove()
    figure.legend(list(lines.values()), list(lines), frameon=False, ncols=4,
                  loc="outside lower center", fontsize=8)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def curve(runs: list[Columns], points: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds, and the error of each run there, linear between measurements in logarithms.

    They go from the latest first measurement to the median of the ends; a run that has ended
    before keeps its error.
    """
    whole = [
        [(s, e) for s, e in zip(run["seconds"], run["error"], strict=True) if e and s > 0]
        for run in runs
    ]
    whole = [run for run in whole if run]
    first = max(run[0][0] for run in whole)
    last = max(first, statistics.median(run[-1][0] for run in whole))
    places = np.geomspace(first, last, points)
    errors = [np.exp(np.interp(np.log(places), *np.log(np.array(run).T))) for run in whole]
    return places, np.array(errors)
