"""Names of the library that options choose from.

They are written here again, and a test compares them: importing the library imports JAX, and help
and misspelt options are told before that.
"""

STRUCTURES = (
    "scalar", "diagonal", "dense", "diag-kfac", "kfac", "sym-kfac", "psd-sym-kfac", "sds-sym-kfac",
    "sds-sym-kfac_norm-d", "h-kfac", "e-kfac", "e-kfac-gpt", "psd-e-kfac", "rms_norm-e-kfac",
    "max_norm-e-kfac", "scaled-rms_norm-e-kfac", "scaled-max_norm-e-kfac", "sep-e-kfac",
    "psd-sep-e-kfac", "sym_swm_kfac", "asym_swm_kfac", "sym_swm_e-kfac", "sym_swm_sep-e-kfac",
    "low-rank-memory", "low-rank-memory-asym",
)  # fmt: skip
"""Of P: `llqr.STRUCTURES`."""

DIVERGENCES = (
    "gauss_newton", "gaussian", "newton", "ngd", "renyi", "renyi_2", "renyi_half", "renyi_zero",
    "reverse_kl", "stable_renyi", "renyi_inf",
)  # fmt: skip
"""Of `llqr.metrics`, and one that says why it is none."""

DRAWN = (
    "gaussian", "ngd", "renyi", "renyi_half", "reverse_kl", "stable_renyi",
)  # fmt: skip
"""Those from which labels can be drawn."""

OF_NUMBERS = ("gaussian", "gauss_newton", "newton")
"""Those of outputs that are numbers, not classes; the first two are one for half a mean square."""

SOLVERS = ("momentum", "sgd", "adam", "relative", "cg", "cg_zoom_hz", "cg_back_pr+")
"""Of refits: `llqr.solvers.SOLVERS`."""

PROBES = ("gradient", "minibatch", "gaussian", "fisher")
"""Directions that P is learned on."""

STREAM_PROBES = ("fisher", "gradient")
"""Where streaming refits see curvature."""

EXACT_SOLVERS = ("auto", "dual", "primal", "cg", "riccati")
"""Of exact steps: `llqr.Solver`."""

GRAFTS = ("none", "global", "block", "rms")
"""Lengths of P g."""
