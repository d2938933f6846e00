"""Second-order methods of others: SOAP and its kin, Shampoo, PSGD-Kron and K-FAC."""

import contextlib
import importlib
from typing import Any

import optax

from benchmarks.suite.engine import PLAIN, REFIT, Engine, optax_engine
from benchmarks.suite.workloads.problem import Workload

from . import muon, shampoo, soap
from .method import Method
from .wrappers import averaged, ema_nesterov

EVERY = 10
"""Steps from one turn of SOAP's bases, or from Shampoo's roots, to the next."""


def _refreshed(workload: Workload, direction: Any, every: int) -> Engine:
    """A direction whose `update` takes `refresh`, which is true in every so manyth step."""

    def make(rate: Any) -> optax.GradientTransformation:
        return optax.chain(direction, optax.scale_by_learning_rate(rate))

    return optax_engine(
        workload,
        make,
        keywords=lambda kind, params, batch: {"refresh": kind == REFIT},
        kind=lambda step: PLAIN if step % every else REFIT,
    )


def _soap(workload: Workload, *, every: int = EVERY, **options: Any) -> Engine:
    return _refreshed(workload, soap.scale_by_soap(**options), every)


def _soap_muon(workload: Workload, *, every: int = EVERY, **options: Any) -> Engine:
    """SOAP's direction, orthogonalised where a leaf is a matrix."""
    direction = optax.chain(soap.scale_by_soap(**options), muon.orthogonalize())
    return _refreshed(workload, direction, every)


def _shampoo(workload: Workload, *, every: int = EVERY, **options: Any) -> Engine:
    return _refreshed(workload, shampoo.scale_by_shampoo(**options), every)


def _kron(workload: Workload, **options: Any) -> Engine:
    psgdax = importlib.import_module("psgdax")  # an extra

    def make(rate: Any) -> optax.GradientTransformation:
        with contextlib.redirect_stdout(None):  # it prints advice
            tx = psgdax.kron(rate, **options)

        def init(params: Any) -> Any:
            with contextlib.redirect_stdout(None):  # it prints its sizes
                return tx.init(params)

        return optax.GradientTransformation(init, tx.update)

    return optax_engine(workload, make)


def _kfac(workload: Workload, **options: Any) -> Engine:
    from . import kfac  # kfac-jax is an extra

    return kfac.engine(workload, **options)


def _adaptive_kfac(workload: Workload, **options: Any) -> Engine:
    from . import kfac  # kfac-jax is an extra

    return kfac.adaptive_engine(workload, **options)  # its rate is the first damping


_SOAP = {"b1": 0.95, "b2": 0.95}
_KL_SHAMPOO = {"b1": 0.95, "shampoo_decay": 0.95, "whiten": True, "kronecker": True}

METHODS = (
    Method("SOAP", _soap, 3e-3, _SOAP,
           ({"b2": 0.99}, {"b1": 0.9}, {"shampoo_decay": 0.9}), second_order=True),
    Method("SOAP every step", _soap, 3e-3, {**_SOAP, "every": 1},
           ({"b2": 0.99}, {"b1": 0.9}, {"shampoo_decay": 0.9}), second_order=True),
    Method("SOAP-Muon", _soap_muon, 1e-2, _SOAP,
           ({"b2": 0.99}, {"b1": 0.9}, {"shampoo_decay": 0.9}), second_order=True),
    Method("SOAP-Muon + averaging", averaged(_soap_muon), 1e-2, {**_SOAP, "share": 0.2},
           ({"share": 0.1}, {"share": 0.4}, {"b1": 0.9}), second_order=True),
    Method("SOAP-Muon + EMA-Nesterov + averaging", averaged(ema_nesterov(_soap_muon)), 1e-2,
           {**_SOAP, "decay": 0.9, "ahead": 1.0, "share": 0.2},
           ({"ahead": 0.5}, {"decay": 0.8}, {"decay": 0.95}), second_order=True),
    Method("KL-SOAP", _soap, 3e-3, {**_SOAP, "whiten": True},
           ({"b2": 0.99}, {"b1": 0.9}, {"shampoo_decay": 0.9}), second_order=True),
    Method("KL-Shampoo", _soap, 3e-3, _KL_SHAMPOO,
           ({"shampoo_decay": 0.9}, {"shampoo_decay": 0.99}, {"b1": 0.9}), second_order=True),
    Method("Shampoo", _shampoo, 3e-3, {"b1": 0.95, "b2": 0.95},
           ({"b2": 0.99}, {"b1": 0.9}, {"power": 0.5}), second_order=True),
    Method("PSGD-Kron", _kron, 1e-3, {"b1": 0.9},
           ({"b1": 0.95}, {"preconditioner_lr": 0.3}, {"weight_decay": 0.01}),
           second_order=True, package="psgdax",
           applies=lambda workload: not workload.float64),  # its state is float32 in parts
    Method("PSGD momentum", _kron, 1e-3,
           {"b1": 0.9, "whiten_grad": False, "preconditioner_update_probability": 1.0},
           ({"b1": 0.95}, {"preconditioner_lr": 0.3}, {"preconditioner_mode": "QUAD"}),
           second_order=True, package="psgdax", applies=lambda workload: not workload.float64),
    Method("K-FAC", _kfac, 0.03,
           {"damping": 1e-2, "momentum": 0.9, "every": 5, "constraint": 1e-3},
           ({"damping": 1e-4}, {"damping": 1e-3}, {"damping": 0.1}),
           second_order=True, package="kfac_jax", applies=lambda workload: workload.layered),
    Method("K-FAC adaptive", _adaptive_kfac, 0.1, {"every": 5, "decay": 0.9},
           ({"every": 1}, {"decay": 0.8}, {"decay": 0.95}),
           second_order=True, package="kfac_jax", share=0.25, decays=False, warms=False,
           applies=lambda workload: workload.layered),
)  # fmt: skip
