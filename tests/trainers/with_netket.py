"""netket's VMC: the ground state of an Ising chain of twelve spins, by a restricted Boltzmann machine."""

import jax
import netket as nk
import optax
from compare import compare

SPINS, STEPS = 12, 200


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    space = nk.hilbert.Spin(0.5, SPINS)
    chain = nk.graph.Chain(SPINS)
    hamiltonian = nk.operator.IsingJax(space, chain, h=1.0)
    lowest = float(nk.exact.lanczos_ed(hamiltonian)[0])

    machine = nk.models.RBM(alpha=2, param_dtype=float)
    sampler = nk.sampler.MetropolisLocal(space)
    found = nk.vqs.MCState(sampler, machine, n_samples=1008, seed=seed, sampler_seed=seed)
    exact = nk.vqs.FullSumState(space, machine, variables=found.variables)
    before = float(exact.expect(hamiltonian).mean)

    driver = nk.VMC(hamiltonian, optimizer, variational_state=found)
    driver.run(STEPS, out=nk.logging.RuntimeLog(), show_progress=False)

    exact.variables = found.variables
    return before - lowest, float(exact.expect(hamiltonian).mean) - lowest


if __name__ == "__main__":
    compare(train, adam=(3e-3, 1e-2, 3e-2), llqr=(3e-3, 1e-2, 3e-2))
