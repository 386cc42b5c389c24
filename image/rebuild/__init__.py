"""Build the same commit twice in two environments, and compare the results: docs/reproducible.md explains."""
