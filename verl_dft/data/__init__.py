"""Training data: problems and rows (records), where they come from (sources), and rows as tensors (dataset)."""
