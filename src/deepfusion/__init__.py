"""DeepFusion: fuse fine-tuned small language models of many devices into one Mixture-of-Experts model.

What can be imported from here is public, see RELEASE.md: `load_config`, `run`, `fuse` and `InputError`. It is loaded
when it is first used: the package itself takes no time.

Lines about the progress of a run are records of the logger `deepfusion`, of level INFO:
`logging.basicConfig(); logging.getLogger("deepfusion").setLevel("INFO")` prints them, those of worker processes too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepfusion.api import fuse, run
    from deepfusion.config import load_config
    from deepfusion.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "__version__", "fuse", "load_config", "run"]

_HOMES = {"InputError": "errors", "fuse": "api", "load_config": "config", "run": "api"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
