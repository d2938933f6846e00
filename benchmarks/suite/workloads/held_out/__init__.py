"""The test set: workloads that no default, rule or constant of the library may be chosen on.

They were written, and their targets fixed from the baselines, before LLQR had run on any of them.
`benchmarks.suite.release` says what of LLQR may run here.
"""

from collections.abc import Callable

from benchmarks.suite.workloads.problem import Workload

from . import numeric, sequences, vision

MAKERS: dict[str, Callable[[], Workload]] = {
    "diffusion": vision.diffusion,
    "vision-transformer": vision.vision_transformer,
    "resnet": vision.resnet,
    "vae": vision.vae,
    "vae-large-batch": vision.vae_large_batch,
    "gru-words": sequences.gru_words,
    "tied-words": sequences.tied_words,
    "scanned-transformer": sequences.scanned_transformer,
    "table": numeric.table,
    "table-large-batch": numeric.table_large_batch,
    "graph": numeric.graph,
    "real-nvp": numeric.real_nvp,
    "policy-distillation": numeric.policy_distillation,
    "wave": numeric.wave,
}

FLOAT64 = ("wave",)
