"""Ready objectives for Flax NNX, Flax Linen and Equinox models; import the one you use."""
