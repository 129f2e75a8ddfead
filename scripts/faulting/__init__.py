"""Parts of ``scripts/faults.py``."""
