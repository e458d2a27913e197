"""The table of architectures: every module of this package with a list `ROWS` adds its rows."""

import importlib
import pkgutil

from .row import Row


def rows() -> list[Row]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__) if found.name != "check"]
    return [row for module in modules for row in getattr(module, "ROWS", [])]
