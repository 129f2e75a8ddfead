"""Post-training between SFT and RL on verl: objectives, data builders, recipes and evaluation."""

__version__ = "0.1.0"
