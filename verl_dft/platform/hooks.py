"""Changing a module once it is imported, so that a plugin need not import it to change it, or refusing its import."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call ``change(module)`` now if module ``name`` is loaded, else right after its first import."""
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, change))


def refuse_import(name: str, why: str) -> None:
    """Let ``import name`` fail with an ImportError that says ``why``; nothing happens where it is loaded already."""
    if name not in sys.modules:
        sys.meta_path.insert(0, _Refusal(name, why))


class _Refusal(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == self.name:
            raise ImportError(self.why, name=fullname)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # once; and the look-up below must reach the ordinary finders
        spec = importlib.util.find_spec(fullname)
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader, self.change)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, change: Callable[[ModuleType], None]) -> None:
        self.loader, self.change = loader, change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.change(module)

    def __getattr__(self, attribute: str) -> object:  # get_source, is_package …: whatever the real one offers
        return getattr(self.loader, attribute)
