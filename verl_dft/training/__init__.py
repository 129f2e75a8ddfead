"""Training on verl: the only package, with ``platform``, that knows verl's internals."""
