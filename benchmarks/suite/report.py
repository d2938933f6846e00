"""The page that a person reads, and its pictures: those of the documentation are drawn with it."""

from pathlib import Path

from . import diagnosis, plots, release, store, tables
from .methods import METHODS
from .methods.method import Method
from .protocol import LEVEL, PENALTY, Tier
from .summary import Result, read
from .workloads import SETS

DOCS = Path(__file__).parents[2] / "docs"
OURS = "LLQR streaming"
NAMES = {
    "development": {"smoke": "benchmark-results", "quick": "benchmark-results",
                    "full": "benchmark-full"},
    "test": {"smoke": "benchmark-test", "quick": "benchmark-test", "full": "benchmark-test-full"},
}  # fmt: skip
"""Of the page, by set and tier."""
IMAGES = {
    "development": {"quick": "images/suite", "full": "images/suite/full"},
    "test": {"quick": "images/suite/test", "full": "images/suite/test-full"},
}
"""Where the documentation has its pictures, by set and tier."""


def write(
    names: list[str], methods: list[Method], tier: Tier, folder: Path, of: str = "development"
) -> Path | None:
    """Write the report of what is there.

    For results that are kept, the page goes into the documentation, whose pictures are drawn when
    it is built; for others beside them, with its pictures.

    Args:
      names: of workloads.
      methods: those that have run are told of.
      tier: how much was run.
      folder: of the results.
      of: the set of the workloads.

    Returns:
      The page, None if there is nothing to report.
    """
    results = _read(names, methods, tier, folder)
    if not results:
        return None
    kept = tier.shorter == 1 and folder.resolve().is_relative_to(DOCS.parent)
    place, images = (DOCS, IMAGES[of][tier.name]) if kept else (folder, "images")
    if not kept:
        _draw(results, tier, folder / images)
    path = place / f"{NAMES[of][tier.name]}.md"
    path.write_text(page(results, tier, folder, images, of))
    print(f"written to {path}")
    return path


def draw(
    names: list[str],
    methods: list[Method],
    tier: Tier,
    folder: Path,
    images: Path,
) -> None:
    """Draw the pictures of the report of what is there."""
    if results := _read(names, methods, tier, folder):
        _draw(results, tier, images)


def _read(names: list[str], methods: list[Method], tier: Tier, folder: Path) -> list[Result]:
    results = [found for name in names if (found := read(folder, name, methods, tier))]
    if not results:
        print(f"nothing to report in {folder}: run first.")
    return results


def _draw(results: list[Result], tier: Tier, images: Path) -> None:
    if tier.name != "full":
        plots.first_page(results, images / "first-page.png")
    plots.profiles(results, images / "profiles.png")
    plots.curves(results, images / "curves.png")
    plots.sensitivity(results, images / "rates.png")


def page(results: list[Result], tier: Tier, folder: Path, images: str, of: str) -> str:
    """Return the report in Markdown."""
    title = "Benchmark: results" + (" on the test set" if of == "test" else "")
    title += ", ten seeds" if tier.name == "full" else ""
    command = "report" + (" --set test" if of == "test" else "") + f" --tier {tier.name}"
    parts = [
        f"# {title}",
        f"Written by `uv run python -m benchmarks.suite {command}`; do not edit. "
        f"{len(results)} workloads, {tier.rates + tier.further} rates and "
        f"{'three values of one more setting' if tier.alternatives else 'nothing else'} tried, "
        f"{tier.seeds} seeds. [What is compared and how](benchmark.md).",
        *([_rule(results, folder)] if of == "test" else []),
        _missing(results, of),
        _where(results),
        "## Over all workloads",
        f"Geometric mean of the costs of all targets by those of {tables.REFERENCE}, below 1 is "
        f"better; a target that is not reached counts as {PENALTY:g} times what the run has spent.",
        tables.means(results),
        f"![Performance profiles]({images}/profiles.png)",
        "## Training and test at the end",
        f"Geometric means of losses at the end of all runs by those of {tables.REFERENCE}, which "
        "makes as many steps; means of accuracies on test examples. Each method is tuned by what "
        "a workload measures; a run that ends above its start counts as it.",
        tables.at_the_end(results),
        *_wins(results, tier),
        "## Loss against gradient evaluations",
        f"![Curves]({images}/curves.png)",
        "## Sensitivity to the rate",
        f"![Loss at the end against the rate]({images}/rates.png)",
    ]
    for result in results:
        parts += _workload(result, folder)
    return "\n\n".join(parts) + "\n"


def _wins(results: list[Result], tier: Tier) -> list[str]:
    """Return what is said of ours against the others, where it has run."""
    if not any(OURS in result.entries for result in results):
        return []
    table = tables.wins(results, OURS, tier)
    return [f"## Wins and losses of {OURS}", _sum(results), table]


def _rule(results: list[Result], folder: Path) -> str:
    """Return what the test set is, and which release has run there."""
    sections = [release.newest(list(store.read(folder, result.name))) for result in results]
    ran = dict.fromkeys(section for section in sections if section)
    return (
        "Nothing was chosen on these workloads: they were written, and their targets fixed from "
        "the baselines, before LLQR had run on any of them. LLQR runs here once for each release, "
        "at its defaults, its rate tuned as everybody's: "
        f"{', '.join(ran) or 'it has not run yet'}."
    )


def _sum(results: list[Result]) -> str:
    found = tables.count(results, OURS)
    return ", ".join(f"{word} {number} times" for word, number in found.items()) + "."


def _missing(results: list[Result], of: str) -> str:
    """Return what has not been run, or not to the end."""
    there = {result.name for result in results}
    ran = {name for result in results for name in result.entries}
    absent = [name for name in SETS[of] if name not in there]
    possible = [m for m in METHODS.values() if of != "test" or not m.ours or m.released is not None]
    others = [method.name for method in possible if method.name not in ran]
    return (
        f"Not there: workloads: {', '.join(absent) or 'none'}; methods: "
        f"{', '.join(others) or 'none'}. What is said over all workloads is said of those that are "
        "there."
    )


def _where(results: list[Result]) -> str:
    """Return in which environments all of it was measured: machines, and commits on each."""
    found: dict[str, dict[str, None]] = {}
    environments = [w for r in results for e in r.entries.values() for w in e.environments]
    for where in environments:
        versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
        machine = (
            f"{where['platform']}, {where['cores used']} of {where['cores']} cores, Python "
            f"{where['python']}, {versions}"
        )
        commit = where.get("commit", "not noted").removesuffix("-dirty")
        found.setdefault(machine, {})[commit] = None
    told = "; ".join(f"{machine}, commits {', '.join(of)}" for machine, of in found.items())
    loads = [where["load"] for where in environments]
    return (
        f"Measured on: {told}. Load when processes began: {min(loads)} to {max(loads)}; seconds "
        "are at the pace of steps measured in turns in one process, or of a method's fastest trial."
    )


def _workload(result: Result, folder: Path) -> list[str]:
    fixed = result.fixed
    parts = [
        f"## {result.name}",
        f"Targets in the {result.measure} loss, fixed from {fixed['method']} at "
        f"{fixed['rate']:g} ({fixed['best']:.4g} on the tuning seed, from {fixed['start']:.4g}), "
        f"the best of {len(fixed['baselines'])} baselines.",
        tables.ends(result),
        f"Costs of the targets: median over seeds ({LEVEL:.0%} bootstrap interval).",
        tables.costs(result, "gradients"),
        tables.costs(result, "seconds"),
    ]
    if found := store.read(folder, result.name).get(diagnosis.SECTION):
        parts += ["Why:", diagnosis.told(found)]
    return parts
