"""Recipes: steps of ``verl-dft`` commands that one YAML file lists, planned, checked, priced and run."""
