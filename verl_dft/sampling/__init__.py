"""Sampling text from a model: the vLLM engine, and the seeds that make a sample reproducible."""
