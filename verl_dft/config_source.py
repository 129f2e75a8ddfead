"""Where Hydra looks for configuration files, and a source that reads each of them once in a process.

A recipe composes a configuration for each of its steps and an evaluation one for each benchmark, all of them of the
same few files; parsing YAML is what composing takes longest for.
"""

import copy
import dataclasses
import functools
import importlib.util
import os
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

from verl_dft.errors import InputError
from verl_dft.paths import configs_dir, recipes_dir

_SCHEME = "verl_dft"


class ReadOnce(FileConfigSource):
    """Hydra's source of files, which keeps what it parsed as long as the file stays as it is."""

    @staticmethod
    def scheme() -> str:
        return _SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        file = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
        try:
            state = os.stat(file)
        except FileNotFoundError:
            return super().load_config(config_path)  # says what is missing
        kept = _parsed(self.provider, self.path, config_path, state.st_mtime_ns, state.st_size)
        return dataclasses.replace(kept, config=copy.deepcopy(kept.config))  # Hydra takes `defaults` out of it


@functools.lru_cache(maxsize=1024)
def _parsed(provider: str, folder: str, config_path: str, mtime_ns: int, size: int) -> ConfigResult:
    return FileConfigSource(provider, f"file://{folder}").load_config(config_path)


class SearchPath(SearchPathPlugin):
    """The primary config's own folder, then our configs and recipes, then verl's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in search_path.get_path():
            if element.provider == "main" and element.path and "://" not in element.path:
                element.path = f"{_SCHEME}://{element.path}"
        for provider, folder in (("verl_dft", configs_dir()), ("verl_dft.recipes", recipes_dir())):
            search_path.append(provider, f"{_SCHEME}://{folder}")
        search_path.append("verl", f"{_SCHEME}://{verl_configs()}")


def verl_configs() -> Path:
    """verl's config folder, located without importing verl, which takes seconds."""
    verl = importlib.util.find_spec("verl")
    if verl is None or not verl.submodule_search_locations:
        raise InputError("verl is not installed; run: verl-dft doctor")
    return Path(verl.submodule_search_locations[0]) / "trainer" / "config"


def register() -> None:
    """Make both known to Hydra; a second call changes nothing."""
    plugins = Plugins.instance()
    if SearchPath not in plugins.discover(SearchPathPlugin):
        plugins.register(ReadOnce)
        plugins.register(SearchPath)
