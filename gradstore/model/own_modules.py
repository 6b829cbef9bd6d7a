"""The modules beside a project file, which are that project's own, whatever else has their names in this process.

Python keeps one module a name, so that a second project's `import net` would be given the first one's code. Here, a
project's code imports through a function of its own, where Python looks for it: `__import__` in the `__builtins__` of
the importing module. While that function works, `sys.modules` holds this project's modules under their names, and
afterwards what was there before. So imports in functions, which run during a forward pass or as a row is read, find the
right ones too.

What looks a module up by its name from elsewhere (pickle, importlib) finds the project that was loaded last.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from importlib.util import resolve_name
from pathlib import Path
from threading import RLock
from types import CodeType, ModuleType
from typing import Any

_lock = RLock()  # of `sys.modules`, which all projects share
_KEPT = {*sys.stdlib_module_names, "gradstore", "numpy", "torch"}  # no folder takes their names


class OwnModules:
    """Modules and packages of one folder, imported anew.

    Args:
        folder: of the project file.

    Attributes:
        builtins: for the globals of code of the project.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = {entry.stem for entry in folder.iterdir() if _is_importable(entry)} - _KEPT
        self._loaded: dict[str, ModuleType] = {}
        self._depth = 0
        self.builtins: dict[str, Any] = {**vars(builtins), "__import__": self._import}

    @contextmanager
    def visible(self) -> Iterator[OwnModules]:
        """Within: their names mean them; afterwards what they meant before, or them where that was nothing."""
        with _lock:
            if self._depth:
                yield self
                return
            others = self._taken()
            sys.modules.update(self._loaded)
            sys.meta_path.insert(0, self)
            self._depth = 1
            try:
                yield self
            finally:
                self._depth = 0
                sys.meta_path.remove(self)
                self._loaded = self._taken()
                sys.modules.update(
                    {**others, **self._loaded} if _are_of_projects(others) else {**self._loaded, **others}
                )

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where one of the folder's modules is; see `importlib.abc.MetaPathFinder`."""
        if not self._is_own(name):
            return None
        loader = partial(_Loader, self)
        for place in [str(self._folder)] if path is None else path:
            spec = FileFinder(place, (loader, SOURCE_SUFFIXES)).find_spec(name)  # type: ignore[arg-type]
            if spec is not None and spec.loader is not None and Path(place).is_relative_to(self._folder):
                return spec
        return None

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """`import` of the project's code."""
        whole = resolve_name("." * level + name, (globals or {}).get("__package__")) if level else name
        if not self._is_own(whole):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        found = self._loaded.get(whole)
        if found is not None and all(hasattr(found, part) for part in fromlist or ()):
            # At once, as Python does it: in a forward pass, this is asked for every time.
            return found if fromlist else self._loaded[whole.partition(".")[0]]
        with self.visible():
            return builtins.__import__(name, globals, locals, fromlist or (), level)

    def _is_own(self, name: str) -> bool:
        return name.partition(".")[0] in self._names

    def _taken(self) -> dict[str, ModuleType]:
        """What `sys.modules` has under these names, and has no longer."""
        return {name: sys.modules.pop(name) for name in list(sys.modules) if self._is_own(name)}


class _Loader(SourceFileLoader):
    """Runs a module from its text, never from compiled code, which Python takes for the text of the same second."""

    def __init__(self, modules: OwnModules, name: str, path: str) -> None:
        super().__init__(name, path)
        self._modules = modules

    def get_code(self, name: str) -> CodeType:
        """See `importlib.abc.InspectLoader`."""
        path = self.get_filename(name)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        module.__dict__["__builtins__"] = self._modules.builtins
        super().exec_module(module)


def _is_importable(entry: Path) -> bool:
    """Whether it is a module or a package."""
    if entry.is_dir():
        return entry.name.isidentifier() and any(entry.glob("*.py"))
    return entry.suffix == ".py" and entry.stem.isidentifier()


def _are_of_projects(modules: Mapping[str, ModuleType]) -> bool:
    """Whether all were imported by projects, and not by the program that loads these."""
    return all(isinstance(getattr(module, "__loader__", None), _Loader) for module in modules.values())
