"""Differential equations by exact steps, and by what a user would take instead.

    OPENBLAS_NUM_THREADS=1 uv run python -m benchmarks.equations run --jobs 2   # resumable
    uv run python -m benchmarks.equations run --problems poisson --methods "exact,SOAP" --seeds 2
    uv run python -m benchmarks.equations report                 # docs/equations-results.md

Error against steps, gradients and seconds; float64. `problems` says what is solved, `methods` by
what, `trials` how it is tuned and timed, `report` how the page comes from what is kept.
"""
