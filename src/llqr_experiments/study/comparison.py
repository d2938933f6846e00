"""Flat minima: the main optimizer, SAM, LLQR and LLQR+SAM side by side."""

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llqr.typing import Array, Params
from llqr_experiments import capacity
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.data import kinds
from llqr_experiments.errors import ConfigError
from llqr_experiments.files import names, write
from llqr_experiments.record import lock, run_folder
from llqr_experiments.record.clock import Clock
from llqr_experiments.run import step, train
from llqr_experiments.run.job import check
from llqr_experiments.study import landscape, potholes
from llqr_experiments.task import tasks

COLORS = {"plain": "#8aa6c1", "SAM": "#2f6fb0", "LLQR": "#e3a43b", "LLQR+SAM": "#c8452c"}
MOST_EXAMPLES = 2048
"""Of the training set, on which sharpness is measured."""


@dataclass(frozen=True)
class Ending:
    """Where one run of one method ended.

    Attributes:
      sharpness: of the loss there.
      figures: what else is compared, by name.
    """

    sharpness: landscape.Sharpness
    figures: dict[str, float]


def variants(config: Config) -> dict[str, Config]:
    """Return the config of every method, by name: with and without SAM, with and without P."""
    plain = {"sam_use_preconditioner_on_update": False, "use_preconditioner": False}
    euclidean = {"perturb_mode": "ema_grad", "norm_mode": "euclidean"}
    mode = config.sam_mode or "base_sam"
    return {
        config.main_optimizer: replace(config, **plain, **euclidean, sam_mode=None),
        "SAM": replace(config, **plain, **euclidean, sam_mode=mode),
        "LLQR": replace(config, use_preconditioner=True, sam_mode=None),
        "LLQR+SAM": replace(config, use_preconditioner=True, sam_mode=mode),
    }


def run(config: Config, out_dir: Path, command: str = "") -> dict[str, list[Ending]]:
    """Run every method from every start, measure where it ends, write table and pictures.

    Args:
      config: validated options; `comparison` says what is compared.
      out_dir: the folder; made if missing.
      command: as typed, for meta.json.

    Returns:
      The endings of every method.

    Raises:
      ConfigError: an illegal option.
    """
    with ExitStack() as stack:
        clock = stack.enter_context(Clock())
        console = Console(highlight=False)
        stack.enter_context(lock.hold(out_dir, command))
        _check(config)
        # Runs of training that an interruption left go on; those that are done are not repeated.
        again = run_folder.look(config, out_dir)
        run_folder.enter(config, out_dir, command, again=again, comparison=config.comparison.name)
        say = partial(console.print, soft_wrap=True)
        trackers = run_folder.open_trackers(config, _title(config), out_dir, say)
        stack.callback(trackers.close)
        compare = _potholes if config.comparison.name == "potholes" else _training
        endings = compare(config, out_dir, console)
        for name, found in endings.items():
            trackers.log(0, {f"{name} {k}": v for k, v in _medians(found).items()}, clock.elapsed())
        rows = {name: [asdict(ending) for ending in found] for name, found in endings.items()}
        write(out_dir / "comparison.json", json.dumps(rows, indent=1) + "\n")
        _draw_rises(endings, _title(config), out_dir / "sharpness.png")
        run_folder.finish(out_dir, time=dict(clock.seconds))
        say("")
        console.print(_table(endings))
        say(
            f"\nmedian, and smallest - largest, of {len(next(iter(endings.values())))} runs\n"
            f"[bold]in[/] {run_folder.shorten(out_dir)}: " + ", ".join(names(out_dir))
        )
    return endings


def _check(config: Config) -> None:
    """What can be checked before anything is written, of every method."""
    if config.comparison.name == "potholes":
        points = config.comparison.runs * (config.comparison.steps + 1)
        told = f"comparison.runs={config.comparison.runs}, steps={config.comparison.steps}: paths"
        capacity.check(8 * points, told)
        for variant in variants(config).values():
            _recipe(variant)
            build.check_schedules(variant, build.Horizon(1.0, config.comparison.steps))
        return
    kind = kinds.of(config.dataset.name)
    if kind is not None and kind.decoded:
        raise ConfigError(
            f"comparison.name=training compares accuracies on a test set: not for "
            f"dataset={config.dataset.name}."
        )
    for variant in variants(config).values():
        check(variant)


def _title(config: Config) -> str:
    if config.comparison.name == "potholes":
        return "potholes"
    return f"{config.dataset.name}, {config.architecture.name}"


_COMPARED = (kinds.IMAGES, kinds.OPERATIONS, kinds.TEXT)


# --- training a model -----------------------------------------------------------------------


def _training(config: Config, out_dir: Path, console: Console) -> dict[str, list[Ending]]:
    """Train every method with every seed; each run has a folder of its own."""
    kind = kinds.of(config.dataset.name)
    if kind not in _COMPARED:
        raise ConfigError(
            "comparison.name=training compares accuracies on a test set, which "
            f"dataset {config.dataset.name} has none of: choose one of "
            f"{', '.join(k.name for k in _COMPARED)}."
        )
    jobs = [
        (name, seed, replace(variant, init_key=seed, rng_seed=seed))
        for name, variant in variants(config).items()
        for seed in range(config.comparison.runs)
    ]
    endings: dict[str, list[Ending]] = {}
    for name, seed, job in track(jobs, "training", console=console):
        done = train.run(job, out_dir / f"{name} {seed}", quiet=True)
        with tasks.wide(config):
            found = _measure_model(config, done)
        endings.setdefault(name, []).append(found)
        console.print(
            f"{name}, seed {seed}: test accuracy {done.metrics['test accuracy']:.2f} %, "
            f"top eigenvalue {found.sharpness.eigenvalue:.3g}"
        )
    return endings


def _measure_model(config: Config, done: train.Result) -> Ending:
    made = done.task.material
    size = min(made.sizes["train"], MOST_EXAMPLES)
    batch = jax.tree.map(jnp.asarray, next(made.streams.evaluation("train", size)))
    bound = tasks.bound(done.task, batch, done.statistics)
    found = landscape.measure(bound, done.params, config.comparison.radii)
    names = ("test accuracy", "test loss")
    return Ending(found, {name: done.metrics[name] for name in names})


# --- potholes -------------------------------------------------------------------------------


def _potholes(config: Config, out_dir: Path, console: Console) -> dict[str, list[Ending]]:
    """Follow every method from the same random starts."""
    options = config.comparison
    starts = jnp.asarray(potholes.starts(options.runs, config.rng_seed), jnp.float32)
    endings, paths = {}, {}
    for name, variant in track(variants(config).items(), "methods", console=console, total=4):
        path = np.asarray(_follow_all(_recipe(variant), options.steps, starts))
        paths[name] = path
        endings[name] = [_measure_point(options.radii, w) for w in path[:, -1]]
    _draw_paths(paths, out_dir / "paths.png")
    return endings


def _recipe(config: Config) -> step.Recipe:
    horizon = build.Horizon(1.0, config.comparison.steps)
    tx, ascent = build.optimizer(config, horizon), build.ascent(config, horizon)
    return step.Recipe(tx, ascent, config.rng_seed)


@partial(jax.jit, static_argnums=(0, 1))
def _follow_all(recipe: step.Recipe, steps: int, starts: Array) -> Array:
    """Points of the paths from all starts: [starts, steps + 1, 2]."""

    def loss(params: Params, batch: Any, carry: tasks.Carry) -> tuple[Array, tasks.Carry]:
        return potholes.OBJECTIVE(params, batch), carry

    def follow(start: Array) -> Array:
        def one(state: step.TrainState, _: Any) -> tuple[step.TrainState, Array]:
            bound = potholes.OBJECTIVE.bind(None)
            active = recipe.ascent is not None
            state, _ = step.advance(loss, recipe, active, state, None, objective=bound)
            return state, state.params["w"]

        first = step.init(recipe, {"w": start})
        _, path = jax.lax.scan(one, first, length=steps)
        return jnp.concatenate([start[None], path])

    return jax.vmap(follow)(starts)


def _measure_point(radii: list[float], w: np.ndarray) -> Ending:
    params = {"w": jnp.asarray(w)}
    found = landscape.measure(potholes.OBJECTIVE.bind(None), params, radii, steps=10)
    z = potholes.stretched(params)
    trapped = float(potholes.depth(z) > potholes.TRAPPED)
    return Ending(found, {"in a pothole, %": 100 * trapped, "bowl": float(potholes.bowl(z))})


# --- tables and pictures --------------------------------------------------------------------


def _columns(endings: list[Ending]) -> Iterator[tuple[str, list[float]]]:
    """Name and values of what is compared."""
    for name in endings[0].figures:
        yield name, [ending.figures[name] for ending in endings]
    yield "loss", [ending.sharpness.loss for ending in endings]
    yield "top eigenvalue", [ending.sharpness.eigenvalue for ending in endings]
    for radius in endings[0].sharpness.rises:
        yield f"rise within {radius:g}", [e.sharpness.rises[radius][0] for e in endings]


def _medians(endings: list[Ending]) -> dict[str, float]:
    """The middle of each; of a share, the mean."""
    return {name: _middle(name)(values) for name, values in _columns(endings)}


def _middle(name: str) -> Callable[[list[float]], float]:
    return statistics.mean if "%" in name else statistics.median


def _table(endings: dict[str, list[Ending]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True, min_width=16)
    for name in endings:
        table.add_column(name, justify="right", overflow="fold")
    columns = {name: dict(_columns(found)) for name, found in endings.items()}
    for row in next(iter(columns.values())):
        table.add_row(row, *(_cell(row, columns[name][row]) for name in endings))
    return table


def _cell(name: str, values: list[float]) -> str:
    if "%" in name:
        return f"{statistics.mean(values):.0f}"
    spread = f"{_number(min(values), 2)} - {_number(max(values), 2)}"
    return f"{_number(statistics.median(values))}\n[dim]{spread}[/]"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _falls(endings: dict[str, list[Ending]]) -> bool:
    """Whether a median mean rise is negative."""
    return any(
        statistics.median(e.sharpness.rises[r][1] for e in found) < 0
        for found in endings.values()
        for r in found[0].sharpness.rises
    )


def _draw_rises(endings: dict[str, list[Ending]], title: str, out: Path) -> None:
    """Draw the rise of the loss over the radius, and the top eigenvalues."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{title}: how sharp the loss is where each method ends", fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    radii = list(next(iter(endings.values()))[0].sharpness.rises)
    for (name, found), color in zip(endings.items(), COLORS.values(), strict=True):
        for which, style in ((0, "-"), (1, ":")):
            middle = [statistics.median(e.sharpness.rises[r][which] for e in found) for r in radii]
            left.plot(radii, middle, style, color=color, marker="o", markersize=3,
                      label=name if which == 0 else None)  # fmt: skip
    left.set(xscale="log", xlabel="radius", ylabel="rise of the loss: worst (line), mean (dots)")
    left.set_yscale("symlog", linthresh=1e-4)  # at a maximum the mean falls
    left.set_ylim(bottom=min(0, left.get_ylim()[0]) if _falls(endings) else 0)
    left.set_xticks(radii, [f"{radius:g}" for radius in radii])
    left.minorticks_off()
    names = list(endings)
    values = [[e.sharpness.eigenvalue for e in endings[name]] for name in names]
    for i, (found, color) in enumerate(zip(values, COLORS.values(), strict=True)):
        spread = np.linspace(-0.25, 0.25, len(found)) if len(found) > 1 else [0.0]
        right.plot(i + np.asarray(spread), found, "o", color=color, markersize=4, alpha=0.6)
        right.plot([i - 0.35, i + 0.35], [statistics.median(found)] * 2, color=color)
    right.set_xticks(range(len(names)), names)
    right.set(ylabel="top eigenvalue of the Hessian", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.legend(frameon=False)
    figure.savefig(out, dpi=130)


def _draw_paths(paths: dict[str, np.ndarray], out: Path) -> None:
    """Draw the first starts' paths over the loss, one panel for each method."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    half = potholes.REACH / np.array(potholes.STRETCH)
    x, y = (np.linspace(-h, h, 241) for h in half)
    grid = {"w": jnp.asarray(np.stack(np.meshgrid(x, y), -1), jnp.float32)}
    z = potholes.stretched(grid)
    values = np.asarray(potholes.bowl(z) - potholes.depth(z))
    panels = figure.subplots(1, len(paths), sharex=True, sharey=True)
    for axes, (name, path), color in zip(panels, paths.items(), COLORS.values(), strict=True):
        axes.contourf(x, y, values, levels=24, cmap="Greys", alpha=0.7)
        for points in path[:12]:
            axes.plot(points[:, 0], points[:, 1], color=color, linewidth=1)
            axes.plot(*points[-1], "o", color=color, markersize=4, markeredgecolor="black")
        axes.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=11)
        axes.set(title=name, xlim=(-half[0], half[0]), ylim=(-half[1], half[1]))
    figure.savefig(out, dpi=130)
