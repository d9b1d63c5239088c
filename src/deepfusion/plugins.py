"""What can be added without a fork: families, distillation methods, clusterings and averages, each found by its name.

A package adds one by an entry point of the group `deepfusion.GROUP`, a program by `register`, at the top level of its
main file: worker processes read that again. docs/guides/extending.md has an example of each.
"""

from __future__ import annotations

from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from deepfusion.errors import InputError

Group = Literal["families", "methods", "clusterings", "averages"]
_registered: dict[tuple[str, str], Any] = {}


def register(group: Group, name: str, found: Any) -> None:
    """Add something to this process.

    Raises:
        ValueError: the name holds other signs than letters, digits, `-` and `_`, or an installed package has it.
    """
    if name in _declared(group):
        raise ValueError(f"{name!r} of {group} is there already")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"{name!r} is no name of a {group}")
    _registered[group, name] = found


def names(group: Group) -> list[str]:
    """All that is there, sorted.

    Raises:
        InputError: there is nothing, not even of this package.
    """
    if not _declared(group):
        what = f"no {group} are installed: Python knows no installed package deepfusion of this version"
        raise InputError(
            what, fix="pip install deepfusion, or make install in its repository", code="not-installed"
        )
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
    """Module and name of a function or class, with what a `partial` or an object's own functions bind to it."""
    bound: list[Any] = []
    if isinstance(found, partial):
        found, bound = found.func, [*found.args, *found.keywords.values()]
    elif not hasattr(found, "__qualname__"):
        found, bound = type(found), [value for value in vars(found).values() if callable(value)]
    name = f"{found.__module__}.{found.__qualname__}"
    names = [qualified_name(value) if callable(value) else repr(value) for value in bound]
    return f"{name}({', '.join(names)})" if names else name


@lru_cache
def _declared(group: Group) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"deepfusion.{group}")}
