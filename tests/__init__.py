"""So that no other package of this name wins: `python -m tests.benchmarks.kernels`."""
