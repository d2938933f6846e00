"""Models of the experiments, in Flax NNX."""

from llqr_experiments.models.mlp import MLP

__all__ = ["MLP"]
