"""What can be added without a fork: families, distillation methods, clusterings and averages, each found by its name.

A package adds one by an entry point of the group `deepfusion.GROUP`, a program by `register`, at the top level of its
main file: worker processes read that again. docs/guides/extending.md has an example of each.
"""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from deepfusion.errors import InputError

Group = Literal["families", "methods", "clusterings", "averages"]
KEYS: dict[Group, str] = {
    "families": "family",
    "methods": "distill.method",
    "clusterings": "clustering.assignment",
    "averages": "clustering.average",
}
"""What names one of a group in a config."""
_OBJECTS: dict[Group, tuple[str, ...]] = {
    "families": ("name", "fits", "settings", "config_class"),
    "averages": ("weights", "combine"),
}
"""What the objects of a group have; of the other groups there are functions and classes."""
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
        InputError: another package has, and it cannot be imported or is nothing of its group (`plugin-broken`).
    """
    if (group, name) in _registered:
        return _checked(group, name, _registered[group, name], "this program")
    points = _declared(group)[name]
    (package, point), *others = points.items()
    if others:
        what = f"is declared by several packages ({', '.join(points)})"
        raise _broken(group, name, f"the package {others[-1][0]}", what)
    package = f"the package {package}"
    try:
        found = point.load()
    except Exception as error:
        if _own_module(point.module):
            raise
        raise _broken(group, name, package, f"cannot be loaded ({_said(error)})") from error
    return _checked(group, name, found, package)


@contextmanager
def blamed(group: Group, found: Any) -> Iterator[None]:
    """Around what runs the code of others: what goes wrong in it is said to be theirs, in one line.

    Raises:
        InputError: in place of any error of an own clustering, method or average (`plugin-failed`).
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        file = _file(found)
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename == file]
        # A call that does not fit ends where it was made, without a frame of the one that was called.
        called = isinstance(error, TypeError) and len(frames) == 2
        if is_ours(found) or not (inside or called):
            raise
        at = f"{file}:{inside[-1].lineno}" if inside else file
        what = f"{qualified_name(found)} failed: {_said(error)}"
        raise InputError(what, where=KEYS[group], fix=f"mend {at}", code="plugin-failed") from error


def version(found: Any) -> str:
    """What tells one state of a function, class or object from another: its qualified name, and of what is not of this
    package a digest of its source, as far as that can be read.
    """
    name = qualified_name(found)
    if is_ours(found):
        return name
    try:
        source = "".join(inspect.getsource(part) for part in _parts(found))
    except (OSError, TypeError):
        return name
    return f"{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}"


def _checked(group: Group, name: str, found: Any, origin: str) -> Any:
    wanted = _OBJECTS.get(group)
    if wanted is None and not callable(found):
        raise _broken(group, name, origin, "is no function or class")
    if wanted is not None and (isinstance(found, type) or not all(hasattr(found, part) for part in wanted)):
        raise _broken(group, name, origin, f"is no object with {', '.join(wanted)}")
    return found


def _broken(group: Group, name: str, origin: str, what: str) -> InputError:
    what, fix = f"{name}, of {origin}, {what}", f"mend or remove {origin}"
    return InputError(what, where=KEYS[group], allowed=", ".join(names(group)), fix=fix, code="plugin-broken")


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def is_ours(found: Any) -> bool:
    """Whether a function, class or object, with all functions that are bound to it, is of this package."""
    return all(_own_module(part.__module__) for part in _parts(found))


def _own_module(name: str) -> bool:
    return name.partition(".")[0] in (__package__, f"{__package__}_bench")


def _parts(found: Any) -> list[Any]:
    """The functions and classes of which something consists."""
    if isinstance(found, partial):
        return [
            part
            for one in (found.func, *found.args, *found.keywords.values())
            if callable(one)
            for part in _parts(one)
        ]
    if hasattr(found, "__qualname__"):
        return [found]
    return [
        type(found),
        *(part for value in vars(found).values() if callable(value) for part in _parts(value)),
    ]


def _file(found: Any) -> str:
    """The source file of what is not of this package in it."""
    for part in _parts(found):
        if not _own_module(part.__module__):
            try:
                return inspect.getsourcefile(part) or ""
            except TypeError:
                continue
    return ""


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
def _declared(group: Group) -> dict[str, dict[str, EntryPoint]]:
    """Of each name the entry points that declare it, by package, this one first."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=f"deepfusion.{group}"):
        found.setdefault(point.name, {})[point.dist.name if point.dist else point.module] = point
    return {
        name: dict(sorted(those.items(), key=lambda one: (one[0] != __package__, one[0])))
        for name, those in found.items()
    }
