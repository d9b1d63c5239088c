"""What a device offers to hand in: its card, and the name, size and SHA-256 of every file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.records import Card
from deepfusion.uploads.card import CARD, FILE_NAMES, MAX_CARD_BYTES, MAX_JSON_BYTES, read_card


class OfferedFile(BaseModel):
    """One file of an upload; `size` in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[ -~]{1,200}$")
    size: int = Field(ge=0, le=10**15)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Offer(BaseModel):
    """A whole upload before a byte of it has moved. The server grants a ticket for exactly this, or says why not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    card: Card
    files: list[OfferedFile] = Field(min_length=2, max_length=10_000)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and digests of all files, 64 hex digits."""
        lines = [
            f"{file.name}\0{file.size}\0{file.sha256}\n"
            for file in sorted(self.files, key=lambda file: file.name)
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_offer(folder: Path) -> Offer:
    """Offer an upload folder, hashing its files again: what changed on the disk since must not be sent.

    Raises:
        InputError: no card, or the files are not those of the card, or none that could be offered.
    """
    card = read_card(folder)
    present = {path.name for path in folder.iterdir() if path.is_file()} - {CARD}
    if wrong := sorted(present ^ set(card.files)):
        what = f"{wrong[0]} is " + (
            "not named in the card" if wrong[0] in present else "named in the card, but not there"
        )
        raise InputError(what, where=folder, fix="deepfusion device train again", code="upload-changed")
    try:
        files = [
            OfferedFile(name=name, size=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
            for name in sorted([CARD, *present])
        ]
        offer = Offer(card=card, files=files)
    except ValidationError as error:
        raise _invalid(error, folder) from None
    for file in files:
        if file.name != CARD and file.sha256 != card.files[file.name]:
            raise InputError(
                "changed since the card was written", where=folder / file.name, code="upload-changed"
            )
    return offer


def parse_offer(text: str) -> Offer:
    """An offer as it came over the network.

    Raises:
        InputError: not of the schema; names the field.
    """
    try:
        return Offer.model_validate_json(text)
    except ValidationError as error:
        raise _invalid(error, "offer") from None


def check_offer(offer: Offer, device: str, max_bytes: int) -> None:
    """Refuse, before a byte has moved, an upload that could not be taken.

    Raises:
        InputError: with the reason, for the device that offers.
    """
    names = [file.name for file in offer.files]
    if offer.card.device != device:
        fix = f"the operator enrolls it as {offer.card.device}, or deepfusion device train --id {device}"
        raise InputError(
            f"the upload is called {offer.card.device}", where=f"device {device}", fix=fix, code="folder-name"
        )
    if len(set(names)) < len(names) or set(names) != {CARD, *offer.card.files}:
        raise InputError("the files are not those of the card", where=f"device {device}", code="card-invalid")
    for file in offer.files:
        if not FILE_NAMES.fullmatch(file.name):
            raise InputError("a file that no upload has", where=file.name, code="unknown-file")
        small = MAX_CARD_BYTES if file.name == CARD else MAX_JSON_BYTES
        if not file.name.endswith(".safetensors") and file.size > small:
            raise InputError(
                f"{file.size} bytes", where=file.name, allowed=f"{small} bytes", code="file-too-large"
            )
        if file.name != CARD and file.sha256 != offer.card.files[file.name]:
            raise InputError("its SHA-256 is not that of the card", where=file.name, code="digest-mismatch")
    if offer.size > max_bytes:
        raise InputError(
            f"{offer.size} bytes", where=f"device {device}", allowed=f"{max_bytes} bytes", code="too-large"
        )


def _invalid(error: ValidationError, where: object) -> InputError:
    first = error.errors()[0]
    field = ".".join(str(part)[:60] for part in first["loc"]) or "offer"
    return InputError(f"{field}: {first['msg'][:200]}", where=where, code="card-invalid")
