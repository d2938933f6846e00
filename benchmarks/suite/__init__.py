"""Optimizers side by side: workloads x methods under one protocol, by one command.

    uv run python -m benchmarks.suite run --tier quick
    uv run python -m benchmarks.suite report --tier quick
    uv run python -m benchmarks.suite run --set test

  module       what it does
  protocol     what is fixed before anything runs: tiers, grids, schedule, targets, threshold
  workloads/   what is trained: data, networks, losses; in held_out/ the test set
  methods/     what trains it
  engine       an optimizer as the loop sees it: start, steps of some kinds, what each costs
  training     compiles an engine, runs one trial
  release      what of LLQR may run on the test set
  agenda       which trials are due
  store        results on disk, a file for each workload
  targets      the losses to reach, fixed from the baselines
  runner       runs what is due, interleaved, a process of one core for each workload
  statistics   times to targets, intervals, profiles, wins
  tables, plots, report    what a person reads
  diagnosis    why: cosines, shares and conditioning, from the library's own diagnostics

docs/benchmark.md explains the protocol and how to run all methods on a problem of your own.
"""
