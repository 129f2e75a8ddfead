"""Where the shipped configs and recipes lie: in a checkout, an editable install or a wheel, from any directory."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    for candidate in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"verl_dft was installed without its {name}/ folder; reinstall it from a wheel or checkout")


def configs_dir() -> Path:
    """Folder of the Hydra configs (``verl_dft/_configs`` in a wheel, ``configs`` in a checkout)."""
    return _shipped("configs")


def recipes_dir() -> Path:
    """Folder of the recipes (``verl_dft/_recipes`` in a wheel, ``recipes`` in a checkout)."""
    return _shipped("recipes")
