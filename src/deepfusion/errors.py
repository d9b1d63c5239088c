"""The one error that a user can cause: one clear line, exit code 2."""

from __future__ import annotations


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
        self, what: str, *, where: object = None, allowed: object = None, fix: str | None = None, code: str = "bad-input"
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


def _rebuild(what: str, where: object, allowed: object, fix: str | None, code: str) -> InputError:
    return InputError(what, where=where, allowed=allowed, fix=fix, code=code)
