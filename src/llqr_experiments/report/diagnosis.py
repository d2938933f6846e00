"""What is wrong with a run, as far as its record tells: pure functions of the record.

A check yields findings; each has the figures it looked at and what to try. Nothing here is a proof:
a finding says where to look first.
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

from llqr_experiments.report.runs import Point, Run


class Finding(NamedTuple):
    """Something that looks wrong.

    Attributes:
      what: in a sentence.
      figures: it was told from.
      advice: what to try.
    """

    what: str
    figures: str
    advice: str


MOST = 0.5
"""From this share on, something happens most of the time."""
RISE = 1.5
"""A loss that ends above so many times its least has diverged."""
ACROSS = 0.05
"""A cosine below which two directions have nothing in common."""
LONG_STEP, SHORT_STEP = 0.3, 1e-6
"""Lengths of an update, by that of the parameters, between which nothing is said."""
GROWTH = 100.0
"""So many times larger, P has grown away."""
LONG = 60.0
"""Seconds below which nobody asks where the time went."""
WAITING = 0.2
"""Share of the time of steps in which they wait for data."""

LOSSES = ("train loss", "sam clean loss")
DIAGONAL = ("scalar", "diagonal")
BEFORE, AFTER = "refit objective before", "refit objective after"
GUARDED, INDEFINITE = "refit guarded blocks", "refit indefinite blocks"
COSINES = ("refit cosine Pg and g", "refit cosine Pm and m")
AGREEMENT = "refit cosine refit and training gradient"
NORM = "Preconditioner l2 norm"
LENGTH = "refit update over parameters"
REFUSED = "exact/refused"


def diagnose(run: Run) -> list[Finding]:
    """Return what looks wrong, the most telling first; empty if nothing does.

    Args:
      run: whole or broken off.
    """
    return [finding for check in CHECKS for finding in check(run)]


def figures(run: Run) -> list[tuple[str, str]]:
    """Return what the checks look at, as (name, first value -> last value)."""
    names = (*LOSSES, BEFORE, AFTER, GUARDED, INDEFINITE, *COSINES, AGREEMENT, LENGTH, NORM)
    found = [(name, run.series(name)) for name in names]
    rows = [(name, _course(points)) for name, points in found if points]
    times = [f"{name} {seconds:.1f} s" for name, seconds in run.phases().items()]
    return [*rows, ("time", ", ".join(times))] if times else rows


def _course(points: list[Point]) -> str:
    if len(points) == 1:
        return f"{_form(points[0])}, once"
    return f"{_form(points[0])} -> {_form(points[-1])}, {len(points)} times"


def _form(point: Point) -> str:
    return "not finite" if point.value is None else f"{point.value:.4g}"


def _values(run: Run, name: str) -> list[float]:
    return [point.value for point in run.series(name) if point.value is not None]


def _not_finite(run: Run) -> Iterator[Finding]:
    for name in LOSSES:
        bad = [point.step for point in run.series(name) if point.value is None]
        if bad:
            good = [p.step for p in run.series(name) if p.step < bad[0]]
            yield Finding(
                f"{name} is not finite",
                f"first at step {bad[0]}, last finite at step {max(good, default=0)}",
                "lower learning_rate, or begin with lr_scheduler=step_warmup; raise damping; "
                "on_nonfinite=skip leaves single bad steps out. At step 1: look at the data.",
            )


def _diverged(run: Run) -> Iterator[Finding]:
    for name in LOSSES:
        values = _values(run, name)
        if len(values) < 3:
            continue
        low, tail = min(values), median(values[-3:])
        # The last one alone may be noise, upwards; that it is low is no divergence.
        risen = min(tail, values[-1])
        # Near zero, a loss that is noise is many times its least.
        if risen > RISE * low and risen > 0.9 * values[0]:
            early = values.index(low) < len(values) / 10
            when = "from the beginning on" if early else "after it had fallen"
            rate = "learning_rate" if early else "lr_scheduler (the rate does not fall)"
            yield Finding(
                f"the run diverges: {name} rises {when}",
                f"{values[0]:.4g} at first, {low:.4g} at least, {tail:.4g} at the end",
                f"lower {rate}; raise damping; precond_graft=global gives P g the length of g.",
            )


def _no_refit(run: Run) -> Iterator[Finding]:
    if run.options.get("use_preconditioner") and run.last() and not run.series(AFTER):
        first = run.options.get("precond_start_step", 0)
        yield Finding(
            "P was never refitted, and is the identity",
            f"precond_start_step={first}, {run.last()} steps",
            "lower precond_start_step, or train longer.",
        )


def _guarded(run: Run) -> Iterator[Finding]:
    counts = _values(run, GUARDED)
    often = sum(count > 0 for count in counts)
    if not counts or often < MOST * len(counts):
        return
    told = f"in {often} of {len(counts)} refits, {max(counts):.0f} blocks at most"
    reasons = {
        reason: [name.rpartition(" guarded, ")[0] for name in run.names() if name.endswith(reason)]
        for reason in REASONS
    }
    found = {reason: leaves for reason, leaves in reasons.items() if leaves}
    for reason, leaves in found.items():
        what, advice = REASONS[reason]
        yield Finding(f"guards keep the old P: {what}", f"{told}; {_few(leaves)}", advice)
    if not found:
        yield Finding("guards keep the old P", told, REASONS["guarded, not finite"][1])


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


REASONS = {
    "guarded, objective not lower": (
        "refits do not lower their objective",
        "divide precond_lr by 10, or precond_solver=relative with precond_lr=0.1; "
        "divergence_reduction=mean if precond_batch_size was raised.",
    ),
    "guarded, direction turned": (
        "P g would point uphill",
        "lower precond_lr; a structure that is positive by construction (psd-e-kfac).",
    ),
    "guarded, not finite": (
        "refits give numbers that are not finite",
        "lower precond_lr, set precond_clip_norm, raise damping.",
    ),
    "guarded, no curvature": (
        "the metric has no curvature there",
        "another divergence (ngd for classes, gaussian for numbers); look for parameters that do "
        "not reach the outputs.",
    ),
}
"""By the end of a name in the record: what it means, and what to try."""


def _unmoved(run: Run) -> Iterator[Finding]:
    pairs = list(zip(_values(run, BEFORE), _values(run, AFTER), strict=False))
    still = sum(abs(a - b) <= 1e-3 * abs(b) for b, a in pairs)
    if pairs and still >= MOST * len(pairs) and not any(_values(run, GUARDED)):
        yield Finding(
            "refits hardly change P",
            f"the objective falls by less than 0.1 % in {still} of {len(pairs)} refits: "
            f"{pairs[-1][0]:.4g} -> {pairs[-1][1]:.4g} in the last",
            "raise precond_lr or precond_steps; precond_solver=cg_zoom_hz finds its own lengths.",
        )


def _indefinite(run: Run) -> Iterator[Finding]:
    counts = _values(run, INDEFINITE)
    often = sum(count > 0 for count in counts)
    if often:
        yield Finding(
            "the curvature along the step is negative: the step has no minimum",
            f"in {often} of {len(counts)} refits; divergence={run.options.get('divergence')}, "
            f"damping={run.options.get('damping')}",
            "multiply damping by 10, or divergence=ngd, which is never negative.",
        )


def _across(run: Run) -> Iterator[Finding]:
    for name in COSINES:
        values = _values(run, name)
        if values and median(values) < ACROSS:
            yield Finding(
                "P turns the gradient away: the step has little of it left",
                f"{name}: {median(values):.3g} in the median, {values[-1]:.3g} at last",
                "raise damping, which draws P to a multiple of the identity; "
                "a coarser block_structure.",
            )


def _unlike(run: Run) -> Iterator[Finding]:
    values = _values(run, AGREEMENT)
    if values and median(values) < 2 * ACROSS:
        yield Finding(
            "P is learned for a direction that training does not take",
            f"{AGREEMENT}: {median(values):.3g} in the median of {len(values)} refits",
            "raise precond_batch_size; refit later (precond_start_step) or on probes "
            "(precond_probe=fisher).",
        )


def _length(run: Run) -> Iterator[Finding]:
    values = _values(run, LENGTH)
    seen = f"{LENGTH}: {median(values):.3g} in the median of {len(values)}" if values else ""
    if values and median(values) > LONG_STEP:
        yield Finding(
            "steps are nearly as long as the parameters",
            f"{seen}; learning_rate={run.options.get('learning_rate')}",
            "lower learning_rate by 10; precond_graft=global gives P g the length of g.",
        )
    if values and median(values) < SHORT_STEP:
        yield Finding(
            "steps hardly move the parameters",
            f"{seen}; learning_rate={run.options.get('learning_rate')}",
            "raise learning_rate by 10; precond_graft=global; lower damping; "
            "divergence_reduction=mean, if the refit batch is large.",
        )


def _grown(run: Run) -> Iterator[Finding]:
    values = _values(run, NORM)
    if len(values) > 1 and values[0] > 0 and values[-1] > GROWTH * values[0]:
        yield Finding(
            "P grows from refit to refit",
            f"{NORM}: {values[0]:.4g} after the first, {values[-1]:.4g} after the last",
            "raise damping; ema_decay=0.9 averages refits; precond_graft=global fixes the length.",
        )


def _adam(run: Run) -> Iterator[Finding]:
    options = run.options
    base, structure = str(options.get("main_optimizer")), options.get("block_structure")
    if not options.get("use_preconditioner") or options.get("precond_on_update"):
        return
    if base.startswith("adam") and structure in DIAGONAL:
        yield Finding(
            f"a {structure} P in front of {base} does almost nothing: Adam divides the scale of "
            "every entry out",
            f"main_optimizer={base}, block_structure={structure}, precond_on_update=false, "
            f"learning_rate={options.get('learning_rate')}",
            "precond_on_update=true puts P behind it; or main_optimizer=polyak with a rate of "
            "its own.",
        )


def _refused(run: Run) -> Iterator[Finding]:
    """Exact steps that are not taken, before there is nothing left to gain."""
    refused = _values(run, REFUSED)
    if not refused or refused[-1] < MOST * run.last():
        return
    loss = _values(run, "train loss")
    yield Finding(
        "exact steps are refused: no damping that was tried lowers the loss",
        f"{refused[-1]:.0f} of {run.last()} steps, at a loss of {loss[-1]:.3g}",
        "fewer steps, where the loss has reached rounding; precision=float64; raise exact_tries "
        "or exact_start.",
    )


def _slow(run: Run) -> Iterator[Finding]:
    seconds = run.phases()
    total, steps = sum(seconds.values()), seconds.get("training", 0.0)
    if total < LONG:
        return
    refits, compiling = seconds.get("refit", 0.0), seconds.get("compile", 0.0)
    if refits > steps:
        yield Finding(
            "refits take longer than training",
            f"{refits:.1f} s of refits, {steps:.1f} s of steps",
            "double update_preconditioner_every; fewer precond_steps; a smaller "
            "precond_batch_size; method=streaming.",
        )
    if compiling > MOST * total:
        yield Finding(
            "most of the time is compilation",
            f"{compiling:.1f} of {total:.1f} s",
            "JAX_COMPILATION_CACHE_DIR=<folder> keeps it for the next run; longer runs.",
        )
    waiting = seconds.get("data", 0.0)
    if waiting > WAITING * (steps + refits + waiting):
        yield Finding(
            "steps wait for data",
            f"{waiting:.1f} s, beside {steps + refits:.1f} s of steps and refits",
            "raise data_threads; docs/data.md says what each set costs.",
        )


def _short(run: Run) -> Iterator[Finding]:
    total = run.meta.get("steps")
    if "finished" not in run.meta and isinstance(total, int) and run.last() < total:
        yield Finding(
            "the run has not come to its end, or is still running",
            f"step {run.last()} of {total}",
            "the same command in the same folder goes on from the newest checkpoint.",
        )


CHECKS: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    _not_finite, _diverged, _no_refit, _guarded, _indefinite, _unmoved, _across, _unlike, _length,
    _grown, _adam, _refused, _slow, _short,
)  # fmt: skip
