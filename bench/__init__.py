"""Side-by-side benchmarks, one file per claim; `harness` has what they share."""
