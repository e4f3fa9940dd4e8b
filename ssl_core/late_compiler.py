"""torch's compiler, imported when something is compiled.

torchvision imports `torch._dynamo` for one function of `roi_align`, and every step of an optimizer does so to be left
alone by it: 85 MB and two fifths of a stage's start (docs/decisions, 12). Until somebody compiles there is nothing to
be left alone by, so a stand-in says so, and gives way to the real module when asked for anything else.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


class StandIn(ModuleType):
    """Answers as the compiler does where nothing is compiled."""

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Do nothing: there is no graph."""

    def disable(
        self, fn: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True
    ) -> Any:
        """Return the function as it is where torch is about to run its own; others may be compiled one day."""
        if wrapping:
            return self.__getattr__("disable")(fn, recursive, reason=reason)
        return fn

    def __getattr__(self, name: str) -> Any:
        """Import the compiler; `__path__` is what the import of one of its modules asks for first."""
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)  # such as `__file__`, which `inspect` asks every module for
        if sys.modules[NAME] is self:
            del sys.modules[NAME]
        return getattr(importlib.import_module(NAME), name)


def postpone() -> None:
    """Put the stand-in in the compiler's place, and import torchvision meanwhile; does nothing where it is imported."""
    if NAME in sys.modules:
        return
    sys.modules[NAME] = StandIn(NAME)
    utils = ModuleType(f"{NAME}.utils")
    utils.is_compile_supported = lambda device_type: False  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules[utils.__name__] = utils
    try:
        import torchvision  # noqa: F401
    finally:
        del sys.modules[utils.__name__]
