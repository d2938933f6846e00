"""The names of the papers, each a choice of sides and spectrum (Layerwise LQR, 2605.04230).

name                     P on the matrix view X [m, n]              numbers stored
scalar                   alpha X (one alpha for a module)           1
diagonal                 d * X                                      m n
dense                    D vec(module)                              (size of the module)^2
diag-kfac                diag(a) X diag(b)                          m + n
kfac                     A X B^T                                    m^2 + n^2
sym-kfac                 A X B, both symmetric                      m^2 + n^2
psd-sym-kfac             the same with A = T T^T                    m^2 + n^2
sds-sym-kfac             the same with A = T diag(s) T^T            m^2 + m + n^2 + n
sds-sym-kfac_norm-d      the same with s / max|s|                   m^2 + m + n^2 + n
h-kfac                   the same with A = Q diag(s) Q^T            5 (m + n)
e-kfac                   U (D * (U^T X W)) W^T                      m^2 + n^2 + m n
e-kfac-gpt               the same; U diagonal for embeddings, W for lm_head/kernel
psd-e-kfac               e-kfac with D = r^2 + 1e-12                m^2 + n^2 + m n
rms_norm-e-kfac          e-kfac with D / rms(D)                     m^2 + n^2 + m n + 1
max_norm-e-kfac          e-kfac with D / max|D|                     m^2 + n^2 + m n + 1
scaled-rms_norm-e-kfac   alpha times rms_norm-e-kfac                m^2 + n^2 + m n + 1
scaled-max_norm-e-kfac   alpha times max_norm-e-kfac                m^2 + n^2 + m n + 1
sep-e-kfac               U (a g^T * (U^T X W)) W^T                  m^2 + n^2 + m + n
psd-sep-e-kfac           the same with a, g = r^2 + 1e-12           m^2 + n^2 + m + n
sym_swm_kfac             kfac, each side changed by one symmetric rank a refit
asym_swm_kfac            kfac, each side changed by one rank a refit
sym_swm_e-kfac           e-kfac, U and W changed by one symmetric rank a refit
sym_swm_sep-e-kfac       sep-e-kfac, likewise
low-rank-memory          (I + u_r u_r^T) ... (I + u_1 u_1^T) vec(module), a new u each refit
low-rank-memory-asym     the same with I + u v^T

Q is a product of four reflections, T lower triangular. Leaves that are no matrices get a
diagonal; with sym_swm_kfac and asym_swm_kfac a square side of the same kind.
"""

from dataclasses import replace

from llqr.errors import unknown
from llqr.structures.matrix import Structure

DIAGONAL = Structure(name="diagonal", spectrum="full")

VOCABULARY = 256
"""Of structure "auto": a longer side over a vocabulary is diagonal. Shorter ones are worth having,
and cost little: from here on sides count as wide (`llqr.Streaming`)."""

_E_KFAC = Structure(name="e-kfac", left="dense", right="dense", spectrum="full")
_SEP = Structure(name="sep-e-kfac", left="dense", right="dense", spectrum="separable")


def _both(name: str, side: str, like: Structure | None = None) -> Structure:
    """A structure with the same kind of side left and right."""
    like = Structure(name=name, left=side) if like is None else like
    return replace(like, name=name, left=side, right=side)


STRUCTURES: dict[str, Structure] = {
    s.name: s
    for s in (
        Structure(name="scalar", spectrum="scalar", view="module"),
        DIAGONAL,
        Structure(name="dense", left="dense", view="module"),
        _both("diag-kfac", "diagonal"),
        _both("kfac", "dense"),
        _both("sym-kfac", "symmetric"),
        _both("psd-sym-kfac", "definite"),
        _both("sds-sym-kfac", "congruent"),
        _both("sds-sym-kfac_norm-d", "congruent_max"),
        _both("h-kfac", "householder"),
        _E_KFAC,
        replace(_E_KFAC, name="e-kfac-gpt", vocabulary=0),
        replace(_E_KFAC, name="psd-e-kfac", positive=True),
        replace(_E_KFAC, name="rms_norm-e-kfac", normalize="rms"),
        replace(_E_KFAC, name="max_norm-e-kfac", normalize="max"),
        replace(_E_KFAC, name="scaled-rms_norm-e-kfac", normalize="rms", scaled=True),
        replace(_E_KFAC, name="scaled-max_norm-e-kfac", normalize="max", scaled=True),
        _SEP,
        replace(_SEP, name="psd-sep-e-kfac", positive=True),
        _both("sym_swm_kfac", "rank_one"),
        _both("asym_swm_kfac", "rank_one_pair"),
        _both("sym_swm_e-kfac", "rank_one", _E_KFAC),
        _both("sym_swm_sep-e-kfac", "rank_one", _SEP),
        Structure(name="low-rank-memory", left="low_rank", view="module"),
        Structure(name="low-rank-memory-asym", left="low_rank_pair", view="module"),
    )
}

AUTO = replace(_E_KFAC, vocabulary=VOCABULARY)
"""What matrices get under the name "auto"."""


def get(name: str | Structure) -> Structure:
    """Return a structure by name.

    Raises:
      ValueError: unknown name; the message names the nearest.

    Example:
      >>> get("kfac").slots
      ('left', 'right')
    """
    if isinstance(name, Structure):
        return name
    if name not in STRUCTURES:
        raise ValueError(unknown("structure", name, [*STRUCTURES, "auto"]))
    return STRUCTURES[name]


def for_vectors(structure: Structure) -> Structure:
    """The structure of the leaves that are no matrices, beside matrices with `structure`."""
    if structure.has_memory and structure.spectrum == "none":
        return replace(structure, right="identity", view="vector")
    return DIAGONAL
