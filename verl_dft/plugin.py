"""verl's entry point (``verl.plugins``): imported on any ``import verl``, in the driver and in every Ray worker.

verl logs a plugin's failure at DEBUG only, so this module reports its own on stderr. ``verl-dft doctor`` shows
``STATUS``.
"""

import sys

STATUS: dict[str, str] = {}
"""``{"platform": …}`` and, after a failure, ``{"error": …}``."""


def _load() -> None:
    from verl_dft.platform.compat import check_verl_version

    check_verl_version()
    from verl_dft.platform import cpu

    STATUS["platform"] = "cpu" if cpu.install() else "left to verl"


try:
    _load()
except Exception as error:
    STATUS["error"] = f"{type(error).__name__}: {error}"
    print(f"verl_dft: plugin failed to load: {STATUS['error']} (run: verl-dft doctor)", file=sys.stderr)
    raise
