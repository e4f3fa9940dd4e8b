"""Import torch's compiler only when something is compiled.

torchvision imports `torch._dynamo` for one function of `roi_align`, each optimizer step to exclude itself from
compilation, and `DistributedDataParallel` to read a setting: 85 MB and two fifths of a stage's start (docs/decisions,
12). As long as nothing is compiled, stand-ins answer these calls. Any other access replaces them by the real modules.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
UTILS = "torch._dynamo.utils"
RULES = "torch._dynamo.trace_rules"


class StandIn(ModuleType):
    """A module that is replaced by the real one when an attribute is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # such as `__file__`, which `inspect` reads from every module
            raise AttributeError(name)
        return self._real(name)

    def _real(self, name: str) -> Any:
        _remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


class Utils(StandIn):
    """`torch._dynamo.utils` as long as nothing is compiled."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """Return False, so that torchvision does not compile `roi_align`."""
        return False

    @staticmethod
    def get_optimize_ddp_mode() -> str:
        """Return torch's default; only compiled code depends on it."""
        return "ddp_optimizer"


class Rules(StandIn):
    """`torch._dynamo.trace_rules` as an attribute only: an import of it is the real one."""

    @staticmethod
    def clear_lru_cache() -> None:
        """Do nothing at the end of a process group: nothing is cached."""


class Compiler(StandIn):
    """`torch._dynamo` as long as nothing is compiled."""

    utils = Utils(UTILS)
    trace_rules = Rules(RULES)

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


def postpone() -> None:
    """Put the stand-ins in place; without effect if the compiler is imported already."""
    if COMPILER not in sys.modules:
        sys.modules[COMPILER] = Compiler(COMPILER)
        sys.modules[UTILS] = Compiler.utils


def _remove_stand_ins() -> None:
    for name in (COMPILER, UTILS):
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]
