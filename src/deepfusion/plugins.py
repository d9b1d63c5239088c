"""What can be added without a fork: families, distillation methods, clusterings and averages, each found by its name.

A package adds one by an entry point of the group `deepfusion.GROUP`, a program by `register`, at the top level of its
main file: worker processes read that again. docs/extending.md has an example of each.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

Group = Literal["families", "methods", "clusterings", "averages"]
_registered: dict[tuple[str, str], Any] = {}


def register(group: Group, name: str, found: Any) -> None:
    """Add something to this process, in place of what has that name.

    Raises:
        ValueError: the name holds other signs than letters, digits, `-` and `_`.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"{name!r} is no name of a {group}")
    _registered[group, name] = found


def names(group: Group) -> list[str]:
    """All that is there, sorted."""
    return sorted({*_declared(group), *(name for of, name in _registered if of == group)})


def load(group: Group, name: str) -> Any:
    """What has that name.

    Raises:
        KeyError: nothing has.
    """
    if (group, name) in _registered:
        return _registered[group, name]
    return _declared(group)[name].load()


def qualified_name(found: Any) -> str:
    """Where something comes from, as `module.name`: of an object that is no function or class its class."""
    named = found if hasattr(found, "__qualname__") else type(found)
    return f"{named.__module__}.{named.__qualname__}"


@lru_cache
def _declared(group: Group) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"deepfusion.{group}")}
