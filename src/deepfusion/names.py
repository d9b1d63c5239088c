"""What a device may be called, and how anything else becomes such a name.

A name stands in file names, configs, messages and tables, so it has to be one on every system.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from deepfusion.errors import InputError

MAX_CHARACTERS = 63
MAX_BYTES = 200  # in UTF-8; file systems take 255, and the names of temporary files are longer
ALLOWED = (
    f"letters and digits of any script, dots, dashes and underscores, at most {MAX_CHARACTERS} ({MAX_BYTES} bytes), "
    "no dot at the ends and no dash in front"
)
_DIGEST = 8  # hex digits
_RESERVED = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)  # Windows opens a device under these names


def is_device_id(name: str) -> bool:
    """Whether a device can be called so; the rule is `ALLOWED`, in Unicode's composed form (NFC)."""
    return (
        0 < len(name) <= MAX_CHARACTERS
        and all(map(_is_plain, name))
        and len(name.encode()) <= MAX_BYTES
        and unicodedata.normalize("NFC", name) == name
        and not name.startswith((".", "-"))
        and not unicodedata.category(name[0]).startswith("M")
        and not name.endswith(".")
        and not _RESERVED.fullmatch(name)
    )


def check_device_id(name: str) -> str:
    """The name, where a device can be called so.

    Raises:
        InputError: it cannot.
    """
    if not is_device_id(name):
        raise InputError(
            "not a name of a device", where=f"{name[:100]!r}", allowed=ALLOWED, code="bad-device-name"
        )
    return name


def _valid(name: str) -> str:
    if not is_device_id(name):
        raise ValueError(f"not a name of a device; allowed: {ALLOWED}")
    return name


DeviceId = Annotated[str, AfterValidator(_valid)]
"""A string that `is_device_id`, as the type of a field."""


def device_id(name: str, salt: str = "") -> str:
    """The id of what somebody called `name`: the name itself where that is allowed, else what is readable of it and a
    digest.

    Args:
        name: any text, also one that is not valid Unicode.
        salt: another one gives another digest, also to an allowed name.
    """
    if is_device_id(name) and not salt:
        return name
    digest = hashlib.sha256((salt + name).encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    words = "".join(c if _is_plain(c) else " " for c in unicodedata.normalize("NFC", name)).split()
    readable = (
        "-".join(words)[: MAX_CHARACTERS - _DIGEST - 1]
        .encode()[: MAX_BYTES - _DIGEST - 1]
        .decode("utf-8", "ignore")
    )
    while readable and (readable[0] in ".-" or unicodedata.category(readable[0]).startswith("M")):
        readable = readable[1:]
    found = f"{readable.rstrip('.-') or 'device'}-{digest}"
    return found if is_device_id(found) else f"device-{digest}"


def device_ids(names: Sequence[str]) -> list[str]:
    """One id for each name, in their order, no two equal: also not for names that are equal, or equal but for case.

    Allowed names come first: what stays itself does so whatever else there is, unless another differs in case only.
    """
    found = [""] * len(names)
    taken: set[str] = set()
    for index in sorted(range(len(names)), key=lambda i: (not is_device_id(names[i]), names[i], i)):
        number = 0
        while _folded(name := device_id(names[index], f"{number}\0" if number else "")) in taken:
            number += 1
        taken.add(_folded(name))
        found[index] = name
    return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def _is_plain(character: str) -> bool:
    kind = unicodedata.category(character)
    return character in "._-" or kind[0] in "LM" or kind == "Nd"
