"""The range of verl versions whose internals this package was written against."""

import importlib.metadata

from verl_dft.errors import InputError

SUPPORTED_VERL = ("0.9.1", "0.9.2")
"""First supported version, first unsupported one."""


def check_verl_version() -> str:
    """Return verl's version; :class:`InputError` where it is missing or outside the supported range."""
    from packaging.version import Version

    first, beyond = SUPPORTED_VERL
    try:
        found = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"verl is not installed; install it with: pip install 'verl=={first}'") from None
    if not Version(first) <= Version(found) < Version(beyond):
        raise InputError(
            f"verl {found} is installed, verl_dft needs >={first},<{beyond} (it subclasses verl's trainer); "
            f"run: pip install 'verl=={first}'"
        )
    return found
