"""``verl-dft analyze``: the figures of the papers from files that other verbs have written, one module each.

A module has ``run(config) -> Analysis``: it reads files, computes tables and says how to draw them.
:mod:`verl_dft.analysis.output` writes both. Nothing here imports verl or torch.
"""
