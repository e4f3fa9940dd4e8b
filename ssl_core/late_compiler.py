"""Import torch's compiler only when something is compiled.

torchvision imports `torch._dynamo` for one function of `roi_align`, and each optimizer step imports it to exclude
itself from compilation: 85 MB and two fifths of a stage's start (docs/decisions, 12). As long as nothing is compiled,
two stand-ins answer these calls. Any other access replaces them by the real modules.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
UTILS = "torch._dynamo.utils"


class StandIn(ModuleType):
    """A module that is replaced by the real one when an attribute is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # such as `__file__`, which `inspect` reads from every module
            raise AttributeError(name)
        return self._real(name)

    def _real(self, name: str) -> Any:
        _remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


class Compiler(StandIn):
    """`torch._dynamo` as long as nothing is compiled."""

    @property
    def __path__(self) -> Any:
        """Import the real package, since the import of a submodule reads this first."""
        return self._real("__path__")

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Do nothing: there is no graph."""

    def disable(
        self, fn: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True
    ) -> Any:
        """Return the function unchanged if torch calls it at once; a wrapped one may be compiled later."""
        if wrapping:
            return self._real("disable")(fn, recursive, reason=reason)
        return fn


class Utils(StandIn):
    """`torch._dynamo.utils` as long as nothing is compiled."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """Return False, so that torchvision does not compile `roi_align`."""
        return False


def postpone() -> None:
    """Put the stand-ins in place; without effect if the compiler is imported already."""
    if COMPILER not in sys.modules:
        sys.modules[COMPILER] = Compiler(COMPILER)
        sys.modules[UTILS] = Utils(UTILS)


def _remove_stand_ins() -> None:
    for name in (COMPILER, UTILS):
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]
