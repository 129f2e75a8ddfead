"""The seed of one sample, a function of what the sample is rather than of when it is drawn."""

import hashlib


def sample_seed(run_seed: int, problem_id: str, index: int) -> int:
    """Seed in [0, 2**63) of sample ``index`` of a problem: SHA-256 of (run seed, problem id, index).

    The same in every process and Python version, and independent of how many samples or problems there are: raising
    ``n`` or ``limit`` adds seeds and changes none.
    """
    key = f"{run_seed}\x1f{problem_id}\x1f{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
