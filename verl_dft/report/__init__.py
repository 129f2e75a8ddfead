"""Turning result files into tables, plots and pages. Imports neither torch nor verl."""
