"""Second-order methods of others: SOAP, PSGD-Kron and K-FAC."""

import contextlib
import importlib
from typing import Any

import optax

from benchmarks.suite.engine import PLAIN, REFIT, Engine, optax_engine
from benchmarks.suite.workloads.problem import Workload

from . import soap
from .method import Method

FREQUENCY = 10
"""Steps from one turn of SOAP's bases to the next."""


def _soap(workload: Workload, **options: Any) -> Engine:
    def make(rate: Any) -> optax.GradientTransformation:
        return optax.chain(soap.scale_by_soap(**options), optax.scale_by_learning_rate(rate))

    return optax_engine(
        workload,
        make,
        keywords=lambda kind, params, batch: {"refresh": kind == REFIT},
        kind=lambda step: PLAIN if step % FREQUENCY else REFIT,
    )


def _kron(workload: Workload, **options: Any) -> Engine:
    psgdax = importlib.import_module("psgdax")  # an extra

    def make(rate: Any) -> optax.GradientTransformation:
        tx = psgdax.kron(rate, **options)

        def init(params: Any) -> Any:
            with contextlib.redirect_stdout(None):  # it prints its sizes
                return tx.init(params)

        return optax.GradientTransformation(init, tx.update)

    return optax_engine(workload, make)


def _kfac(workload: Workload, **options: Any) -> Engine:
    from . import kfac  # kfac-jax is an extra

    return kfac.engine(workload, **options)


METHODS = (
    Method("SOAP", _soap, 3e-3, {"b1": 0.95, "b2": 0.95},
           ({"b2": 0.99}, {"b1": 0.9}, {"shampoo_decay": 0.9}), second_order=True),
    Method("PSGD-Kron", _kron, 1e-3, {"b1": 0.9},
           ({"b1": 0.95}, {"preconditioner_lr": 0.3}, {"weight_decay": 0.01}),
           second_order=True, package="psgdax",
           applies=lambda workload: not workload.float64),  # its state is float32 in parts
    Method("K-FAC", _kfac, 0.03,
           {"damping": 1e-2, "momentum": 0.9, "every": 5, "constraint": 1e-3},
           ({"damping": 1e-4}, {"damping": 1e-3}, {"damping": 0.1}),
           second_order=True, package="kfac_jax", applies=lambda workload: workload.layered),
)  # fmt: skip
