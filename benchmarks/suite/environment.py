"""Where results were measured."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("llqr", "jax", "jaxlib", "optax", "numpy", "psgdax", "kfac-jax")


def environment(**more: Any) -> dict[str, Any]:
    """Return versions, machine and what else is told."""
    return {
        "commit": _commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cores used": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0]),
        **more,
    }


def _commit() -> str | None:
    """Return the commit that is checked out, marked where files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    place = Path(__file__).parent
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def version(name: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
