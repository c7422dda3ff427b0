"""``aptq -cn benchmark``: what each backend makes of a layer, in error and in time."""

from aptq.benchmark.measure import Benchmark, Refusal, Result, Row, run_benchmark

__all__ = ["Benchmark", "Refusal", "Result", "Row", "run_benchmark"]
