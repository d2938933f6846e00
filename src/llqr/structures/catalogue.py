"""The names of the papers, each a choice of sides and spectrum (Layerwise LQR, 2605.04230).

name         P on the matrix view X [m, n]        numbers stored
scalar       alpha X (one alpha for a module)     1
diagonal     d * X                                m n
dense        D vec(module)                        (size of the module)^2
diag-kfac    diag(a) X diag(b)                    m + n
kfac         A X B^T                              m^2 + n^2
e-kfac       U (D * (U^T X W)) W^T                m^2 + n^2 + m n
sep-e-kfac   U (a g^T * (U^T X W)) W^T            m^2 + n^2 + m + n
"""

from llqr._errors import unknown
from llqr.structures.matrix import Structure

DIAGONAL = Structure(name="diagonal", spectrum="full")

STRUCTURES: dict[str, Structure] = {
    s.name: s
    for s in (
        Structure(name="scalar", spectrum="scalar", joint=True),
        DIAGONAL,
        Structure(name="dense", left="dense", joint=True),
        Structure(name="diag-kfac", left="diagonal", right="diagonal"),
        Structure(name="kfac", left="dense", right="dense"),
        Structure(name="e-kfac", left="dense", right="dense", spectrum="full"),
        Structure(name="sep-e-kfac", left="dense", right="dense", spectrum="separable"),
    )
}


def get(name: str | Structure) -> Structure:
    """Return a structure by name.

    Raises:
      ValueError: unknown name; the message names the nearest.
    """
    if isinstance(name, Structure):
        return name
    if name not in STRUCTURES:
        raise ValueError(unknown("structure", name, STRUCTURES))
    return STRUCTURES[name]
