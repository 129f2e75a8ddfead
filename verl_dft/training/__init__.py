"""Training on verl: the only package, with ``platform``, that knows verl's internals."""

import warnings

# verl warns of each of its engines that is not installed; here it is always the FSDP one that runs
warnings.filterwarnings("ignore", message=r".* engine is not available: ModuleNotFoundError", category=UserWarning)
