"""Benchmarks: one file per question a user asks. Run them as modules from the repository root (see bench/README.md)."""
