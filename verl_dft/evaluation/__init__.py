"""Evaluation: benchmarks, sampling with vLLM, grading, and metrics with intervals."""
