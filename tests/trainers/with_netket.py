"""netket's VMC: the ground state of twelve spins in a chain, by a restricted Boltzmann machine."""

from typing import Any

import netket as nk
import optax
from compare import compare


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the energy above that of the ground state before and after."""
    space = nk.hilbert.Spin(0.5, 12)
    hamiltonian = nk.operator.IsingJax(space, nk.graph.Chain(12), h=1.0)
    lowest = float(nk.exact.lanczos_ed(hamiltonian)[0])
    machine = nk.models.RBM(alpha=2, param_dtype=float)
    sampler = nk.sampler.MetropolisLocal(space)
    first = nk.vqs.MCState(sampler, machine, seed=seed).variables

    psi = nk.vqs.MCState(sampler, machine, n_samples=1008, seed=seed, sampler_seed=seed)
    driver = nk.VMC(hamiltonian, optimizer, variational_state=psi)
    driver.run(200, out=nk.logging.RuntimeLog(), show_progress=False)

    def above(variables: Any) -> float:
        exact = nk.vqs.FullSumState(space, machine, variables=variables)
        return float(exact.expect(hamiltonian).mean) - lowest

    return above(first), above(psi.variables)


if __name__ == "__main__":
    compare(train)
