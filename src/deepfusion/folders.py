"""Output folders and files: what is ours to write, how it comes to be whole, and who works there.

An output that exists is somebody's until it is proved to be ours. Nothing is removed or overwritten here that this
program did not
make: outputs are written beside their place and get their name when they are whole, and a work folder is known by
    its key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from deepfusion.errors import InputError

KEY = "key"
_PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")  # of `write_whole`
"""File in a work folder with the digest of what was asked; it proves that the folder is ours."""

LOCK = ".lock"


# What may be written -------------------------------------------------------------------------------------------------


def place(target: Path, inputs: Iterable[Path] = ()) -> Path:
    """Where an output folder goes, all links followed; it may exist.

    Args:
        inputs: files and folders that are read: the output must not hold one, nor lie in one.

    Raises:
        InputError: not a folder, a place that cannot be written, the current directory, the home or one above them
            (`bad-out`), or an input is in the way (`input-in-out`).
    """
    found = _place(target, inputs)
    for name in (Path.cwd(), Path(os.path.expanduser("~"))):
        home = Path(os.path.realpath(name))
        if found in (home, *home.parents):
            what = "the current directory, the home folder or one above them"
            raise InputError(what, where=target, fix="choose a folder of its own", code="bad-out")
    return found


def place_to_replace(target: Path, inputs: Iterable[Path] = ()) -> Path:
    """As `place`, of a folder that a finished one takes the place of.

    Raises:
        InputError: as `place`; also a mount point, or a folder around it that cannot be written (`bad-out`).
    """
    found = place(target, inputs)
    if found.exists() and os.path.ismount(found):
        raise InputError(
            "a mount point cannot be replaced", where=target, fix="choose a folder in it", code="bad-out"
        )
    _check_writable(found.parent, target)
    return found


def claim_run(out: Path, inputs: Iterable[Path] = ()) -> Path:
    """A run folder to work in: a new or empty one, or one of ours.

    Raises:
        InputError: as `place`, or other things lie in the folder (`not-a-run`).
    """
    if is_run(out):
        return _place(out, inputs)
    found = place(out, inputs)
    if odd := next((path for path in _entries(found) if not _is_idle_lock(path)), None):
        if (found / "manifest.json").exists() or (found / ".work").is_dir():
            what = (
                "manifest.json is missing or damaged, so what lies here cannot be told from what others made"
            )
            fix = "bring manifest.json back, or choose another --out; deepfusion fuse takes the uploads in it"
            raise InputError(what, where=out, fix=fix, code="not-a-run")
        what = f"the folder holds {odd.name} and is no run folder"
        raise InputError(what, where=out, fix="choose another --out", code="not-a-run")
    return found


def make(folder: Path) -> None:
    """Make a folder unless it is there.

    Raises:
        InputError: it cannot be made (`bad-out`).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot be made ({error.strerror})", where=folder, fix="choose another --out", code="bad-out"
        ) from None


def claim_file(target: Path, ours: Callable[[str], bool], inputs: Iterable[Path] = ()) -> Path:
    """A file to write, all links followed: a new one, or one whose text is an earlier output.

    Raises:
        InputError: a place that cannot be written (`bad-out`), an input (`input-in-out`), or somebody else's file
            (`not-ours`).
    """
    found = _follow(target)
    if found.is_dir():
        raise InputError("a folder, not a file", where=target, fix="choose another --out", code="bad-out")
    _check_writable(found.parent, target)
    _check_inputs(found, target, inputs)
    if found.exists():
        try:
            known = found.is_file() and ours(found.read_text("utf-8"))
        except ValueError:
            known = False
        if not known:
            raise InputError(
                "DeepFusion did not make this file", where=target, fix="choose another --out", code="not-ours"
            )
    return found


def local_path(name: str | Path) -> Path:
    """A path as a user writes it: `~` and `~NAME` stand for home folders, where there are such."""
    return Path(os.path.expanduser(name))


def standing(folder: Path) -> Path:
    """A folder that may not exist yet, or else the nearest one above it that does."""
    return next(path for path in (folder, *folder.parents) if path.exists() or path == path.parent)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder: it has a manifest, or the ledger of a federation that waits for uploads."""
    if (folder / "federation" / "ledger.sqlite").is_file():
        return True
    try:
        found = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("stages"), dict)


def _place(target: Path, inputs: Iterable[Path]) -> Path:
    found = _follow(target)
    if found.exists() and not found.is_dir():
        raise InputError("not a folder", where=target, fix="choose another --out", code="bad-out")
    _check_writable(found, target)
    _check_inputs(found, target, inputs)
    return found


def _follow(target: Path) -> Path:
    whole = Path.cwd() / target
    for path in (whole, *whole.parents):
        if path.is_symlink() and not path.exists():
            raise InputError(
                "a link that leads nowhere", where=path, fix="choose another --out", code="bad-out"
            )
    return Path(os.path.realpath(whole))


def _check_writable(folder: Path, target: Path) -> None:
    """Whether something can be made in a folder that may not exist yet."""
    nearest = standing(folder)
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file", where=target, fix="choose another --out", code="bad-out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"{nearest} cannot be written", where=target, fix="choose another --out", code="bad-out"
        )


def _check_inputs(found: Path, target: Path, inputs: Iterable[Path]) -> None:
    for path in inputs:
        read = Path(os.path.realpath(path))
        if found == read or found in read.parents:
            what = f"{path} is read, so it must not lie where the output goes"
        elif read in found.parents:
            what = f"the output must not lie in {path}, which is read"
        else:
            continue
        raise InputError(what, where=target, fix="choose another --out", code="input-in-out")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_idle_lock(path: Path) -> bool:
    return path.name == LOCK and stat.S_ISREG(path.lstat().st_mode) and path.lstat().st_size == 0


# How it comes to be whole --------------------------------------------------------------------------------------------


def write_whole(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a file so that it is always the old one or the new one, also when the process is killed; text as UTF-8.

    Args:
        mode: permissions of the file, from its first byte on; the umask takes from them.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which is called `target` when the block ends: never half-written.

    Raises:
        InputError: as `put`.
    """
    work = target.with_name(f".{target.name}.part")
    open_work(work, hashlib.sha256(b"whole folder").hexdigest(), anew=True)
    try:
        (work / "new").mkdir()
        yield work / "new"
        put(work / "new", target)
    finally:
        remove(work)


def put(made: Path, target: Path) -> None:
    """Give a finished folder its name, where there is nothing or an empty folder.

    Raises:
        InputError: there is something, which may have come since it was looked at (`not-ours`).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.is_dir() and not target.is_symlink():
            target.rmdir()
        elif os.path.lexists(target):
            raise FileExistsError
        os.rename(made, target)
    except OSError as error:
        if not os.path.lexists(target) or (not isinstance(error, FileExistsError) and not _entries(target)):
            raise
        what, fix = (
            "something lies there that DeepFusion did not make",
            "move it away; the same command goes on",
        )
        raise InputError(what, where=target, fix=fix, code="not-ours") from None


def sync(path: Path) -> None:
    """Have the system write a file of ours, or the names in a folder, to the disk."""
    if path.is_dir():
        with suppress(OSError):  # not all systems and disks can do this with a folder
            _fsync(path, os.O_RDONLY)
    else:
        _fsync(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, links and other odd things as what they are, with permissions of our own: copies must be
    removable.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(source):
        copy = target / entry.name
        if entry.is_symlink():
            copy.unlink(missing_ok=True)
            os.symlink(os.readlink(entry), copy)
        elif entry.is_dir():
            copy_folder(Path(entry), copy)
        elif entry.is_file():
            shutil.copyfile(entry, copy)
        else:  # a pipe, socket or device, which nobody may open; a pipe stands for it
            copy.unlink(missing_ok=True)
            os.mkfifo(copy)


# Work folders --------------------------------------------------------------------------------------------------------


def open_work(folder: Path, key: str, anew: bool = False) -> bool:
    """Make a work folder, or go on in one of the same key; one of another key is begun anew.

    Args:
        key: digest of what is asked (64 hex digits), on which all that is kept here depends.
        anew: also where the key is the same.

    Returns:
        Whether there is something to go on with.

    Raises:
        InputError: a folder of that name which is not ours (`not-ours`).
    """
    found = work_key(folder)
    if found == key and not anew:
        return True
    if found is not None:
        remove(folder)
    make(folder)
    (folder / KEY).write_text(key, "utf-8")
    return False


def bind(folder: Path, key: str, *results: Path) -> None:
    """Tie a folder to one request, so that what is finished in it is never taken for the answer to another.

    Args:
        results: what a request leaves there; where one exists, the key must be there too.

    Raises:
        InputError: the folder belongs to another request (`another-run`).
    """
    try:
        found = (folder / KEY).read_text("utf-8")
    except FileNotFoundError:
        found = "" if any(path.exists() for path in results) else key
    if found != key:
        what = "what lies there was made of other data, settings or checkpoints, or by another version"
        raise InputError(what, where=folder, fix="choose another folder, or remove it", code="another-run")
    make(folder)
    write_whole(folder / KEY, key)


def work_key(folder: Path) -> str | None:
    """The key of a work folder; None where there is nothing of that name. Not whole if it was killed before it had one.

    Raises:
        InputError: a folder of that name which is not ours (`not-ours`).
    """
    if not os.path.lexists(folder):
        return None
    if folder.is_dir() and not folder.is_symlink():
        names = [path.name for path in _entries(folder)]
        text = (folder / KEY).read_text("utf-8", "replace") if (folder / KEY).is_file() else ""
        # A kill between folder and key leaves an empty folder, or a part of the key alone in it.
        torn = not names or (
            names == [KEY] and (folder / KEY).is_file() and re.fullmatch(r"[0-9a-f]{0,63}", text)
        )
        if torn or re.fullmatch(r"[0-9a-f]{64}", text):
            return text
    fix = "move it away, or choose another --out"
    raise InputError("in the way, and DeepFusion did not make it", where=folder, fix=fix, code="not-ours")


def remove(folder: Path) -> None:
    """Remove a folder of ours with all that is in it, read-only folders too; its key goes last, so that a kill does
    no harm.
    """
    if not folder.is_dir():
        return
    _let_go(folder)
    for parent, names, _ in os.walk(folder):
        for name in names:
            _let_go(Path(parent, name))
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != KEY:
            path.unlink()
    (folder / KEY).unlink(missing_ok=True)
    folder.rmdir()


def clear_parts(folder: Path) -> None:
    """Remove the parts of files that a killed process left in a folder where nobody else works."""
    for path in folder.glob(".*.part"):
        if _PART.fullmatch(path.name) and path.is_file():
            path.unlink()


def clear_work(folder: Path) -> None:
    """Remove the work folders of `whole_folder` that a killed process left anywhere in a folder of ours."""
    for path in list(folder.rglob(".*.part")):
        if path.is_dir() and (path / KEY).is_file():
            remove(path)


def _let_go(folder: Path) -> None:
    """Make a folder give up what is in it."""
    if not folder.is_symlink() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        folder.chmod(0o700)


# Who works there -----------------------------------------------------------------------------------------------------


def is_locked(path: Path) -> bool:
    """Whether some process holds this lock, as far as that can be seen."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


@contextmanager
def locked(path: Path, busy: InputError | None = None, poll_seconds: float = 0.05) -> Iterator[None]:
    """Alone, of all processes that lock this file, until the block ends.

    Args:
        busy: raised where another process is at work; None waits for it.
        poll_seconds: how often who waits looks again; beside busy processes who seldom looks starves.

    Raises:
        InputError: `busy`, or the file cannot be written (`bad-out`).
    """
    lock = FileLock(path, timeout=-1 if busy is None else 0, poll_interval=poll_seconds)
    try:
        lock.acquire()
    except Timeout:
        assert busy is not None
        raise busy from None
    except OSError as error:
        raise InputError(
            f"cannot write there ({error.strerror})", where=path.parent, code="bad-out"
        ) from None
    try:
        yield
    finally:
        lock.release()
