"""Online training: verl's PPO trainer with our algorithms, demonstrations, seeds and limits (``verl-dft rl``)."""
