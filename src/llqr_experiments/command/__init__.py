"""Around runs: help, forecasts, sweeps, tables of options."""
