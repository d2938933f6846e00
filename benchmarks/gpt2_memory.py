"""What a refit of GPT-2 small holds in memory: as a plan says it, and as it is.

    uv run python benchmarks/gpt2_memory.py           # needs 16 GiB of memory, and Linux
    uv run python benchmarks/gpt2_memory.py --quick   # a small sibling

GPT-2 small (50,257 tokens, windows of 1,024) with e-kfac-gpt, in chunks of one window. A plan
(`dry_run=true`) prints XLA's figure, see `llqr_experiments.command.memory`. Beside it stands
by how much the peak of resident memory rises while the same refit runs, compiled as a whole.
Each row is measured in a process of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from reporting import MEBIBYTE, environment, show, write
from rich.progress import track

import llqr
from llqr_experiments import models
from llqr_experiments.command import memory
from llqr_experiments.data.material import Material
from llqr_experiments.task import tasks

SMALL = {"width": 128, "heads": 4, "depth": 4}
STEPS = 2
"""Inner steps that are run; memory does not depend on their number."""


def measure(windows: int, quick: bool, run: bool) -> dict[str, Any]:
    """Ask the compiler, then run."""
    length, classes = (256, 8192) if quick else (1024, 50_257)
    model = models.make("gpt2-small", (length,), classes, seed=0, options=SMALL if quick else {})
    nothing: Any = None  # no data is read
    made = Material(
        "tokens", "text", nothing, {}, (), (length,), classes, inputs=lambda batch: batch["tokens"]
    )
    task = tasks.assemble("memory", made, model)
    tx = llqr.llqr(
        optax.sgd(0.1),
        structure="e-kfac-gpt",
        route=llqr.Route(chunk_size=1),
        refit=llqr.Refit(steps=STEPS),
    )
    tokens = jnp.zeros((windows, length), jnp.int32)
    objective = tasks.bound(task, {"tokens": tokens, "label": tokens}, task.statistics)
    state = tx.init(task.params) if run else jax.eval_shape(tx.init, task.params)
    compiled = memory.compile_refit(tx, state, task.params, objective)
    row: dict[str, Any] = {
        "windows": windows,
        "P (MiB)": memory.size(state) / MEBIBYTE,
        "plan: on top (MiB)": memory.temporary(compiled) / MEBIBYTE,
    }
    if run:
        jax.block_until_ready((state, task.params, objective))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
        before = _resident("VmRSS")
        result = jax.block_until_ready(compiled(state, task.params, objective))
        held = (_resident("VmHWM") - before) / MEBIBYTE
        new = memory.size(result) / MEBIBYTE
        row["measured, less the new P (MiB)"] = held - new
        row["plan / measured"] = row["plan: on top (MiB)"] / (held - new)
    return row


def _resident(name: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Measure all rows, print a table, write JSON with the environment."""
    parser = argparse.ArgumentParser(description="What a refit of GPT-2 holds in memory.")
    parser.add_argument("--quick", action="store_true", help="a small sibling")
    parser.add_argument("--row", type=int, help="windows of one row, printed as JSON")
    parser.add_argument("--run", type=int, default=2, help="most windows that are run")
    arguments = parser.parse_args()
    if arguments.row:
        row = measure(arguments.row, arguments.quick, arguments.row <= arguments.run)
        print(json.dumps(row))
        return
    flags = [*(["--quick"] if arguments.quick else []), f"--run={arguments.run}"]
    rows = []
    for windows in track((1, 2, 32), "compiling and running"):
        command = [sys.executable, __file__, f"--row={windows}", *flags]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
    name = "gpt2_memory_quick" if arguments.quick else "gpt2_memory"
    show("One refit of GPT-2, e-kfac-gpt, chunks of one window", rows)
    write(name, environment(steps=STEPS, run=arguments.run), rows)


if __name__ == "__main__":
    main()
