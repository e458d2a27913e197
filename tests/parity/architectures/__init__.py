"""The table of architectures: every module of this package with a list `ROWS` adds its rows."""

import importlib
import pkgutil

from .row import Row


def rows(module: str = "") -> list[Row]:
    """The rows of one module, or of all."""
    names = [module] if module else [found.name for found in pkgutil.iter_modules(__path__) if found.name not in ("check", "run", "caches")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [row for found in modules for row in getattr(found, "ROWS", [])]
