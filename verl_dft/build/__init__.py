"""Builders: from graded samples to training data. Each is a pure step with a command beside it."""
