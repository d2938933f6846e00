"""Around runs: help, plans, sweeps, tables of options."""
