"""The one error that a user can cause: one clear line, exit code 2."""

from __future__ import annotations

import errno
import os
import re


class InputError(Exception):
    """Bad input from a user, a device or a file; never a defect of the program.

    Args:
        what: what is wrong, as a short sentence without a full stop.
        where: the file, config key or device that is wrong.
        allowed: what would have been right.
        fix: how to mend it.
        code: a stable kebab-case name for the kind of failure, for machines and for searching the documentation.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        allowed: object = None,
        fix: str | None = None,
        code: str = "bad-input",
    ) -> None:
        self.what, self.where, self.allowed, self.fix, self.code = what, where, allowed, fix, code
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where is not None else self.what]
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        if self.fix is not None:
            parts.append(f"fix: {self.fix}")
        return "; ".join(" ".join(part.split()) for part in parts) + f" [{self.code}]"

    def at(self, where: object) -> InputError:
        """The same error at another place."""
        return InputError(self.what, where=where, allowed=self.allowed, fix=self.fix, code=self.code)

    def __reduce__(self) -> tuple:
        # Keyword-only arguments are lost by the default reduction, and errors cross process borders.
        return _rebuild, (self.what, self.where, self.allowed, self.fix, self.code)


_NAMES = (
    *(
        "EACCES",
        "EPERM",
        "EROFS",
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EIO",
        "ENOTDIR",
        "EISDIR",
        "ENAMETOOLONG",
        "ELOOP",
        "EBUSY",
    ),
    *("ETXTBSY", "EXDEV", "ENOTEMPTY", "EMFILE", "ENFILE"),
)
_NO_ACCESS = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}  # not all systems know all


def no_access(error: BaseException, where: object = None) -> InputError | None:
    """What a disk that is full, a file that must not be read and the like is to a user; None for what may be a defect.

    Args:
        error: also of libraries that name the error of the system in their text alone.
        where: what was being written, where the error does not say so.
    """
    number = error.errno if isinstance(error, OSError) else None
    name = error.filename if isinstance(error, OSError) else None
    if number is None:
        text = str(error)
        found = re.search(r"\(os error (\d+)\)", text)  # as safetensors and tokenizers say it
        number = (
            int(found[1]) if found else errno.ENOSPC if "PytorchStreamWriter failed writing" in text else None
        )
    if number is None or number not in _NO_ACCESS:
        return None
    fix = "make room and give the same command again" if number == errno.ENOSPC else None
    return InputError(
        os.strerror(number), where=name if name is not None else where, fix=fix, code="no-access"
    )


def _rebuild(what: str, where: object, allowed: object, fix: str | None, code: str) -> InputError:
    return InputError(what, where=where, allowed=allowed, fix=fix, code=code)
