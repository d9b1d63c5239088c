"""The card of an upload: what it says about itself. Needs no model framework, so that moving uploads does not
either."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deepfusion.config import Encoder, Encoding, Method
from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.folders import claim_file, place_to_replace, work_key, write_whole
from deepfusion.names import DeviceId

CARD = "card.json"
MAX_CARD_BYTES = 2**20
MAX_JSON_BYTES = 64 * 2**20

FILE_NAMES = re.compile(
    r"(card|config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors|(adapter_model|delta)\.safetensors"
    r"|vocab\.txt|merges\.txt|\w+\.model|chat_template\.jinja|README\.md"
)


class Card(BaseModel):
    """What an upload says about itself; nothing in it is text of the device or names its domain.

    `loss_before` and `loss_after` are nats per token on the device's own held-out text; an adopted checkpoint has none
    and says 0 tokens. `signature` is `models.type_signature`, `files` maps every other file to its SHA-256.
    `encoding` says how the weights are written, `encoding_error` by how much one of them differs at most for that
    reason.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    device: DeviceId
    type: str = Field(max_length=200)
    model_class: str = Field(pattern=r"^\w{1,100}$")
    signature: str = Field(pattern=r"^[0-9a-f]{64}$")
    base: str = Field(max_length=1000)
    base_digest: str = Field(pattern=r"^([0-9a-f]{64})?$")
    method: Method
    encoding: Encoding = "weights"
    encoding_error: float = Field(0.0, ge=0)
    embedding: list[float] = Field(min_length=2, max_length=1024)
    encoder: Encoder
    tokens: int = Field(ge=0, le=10**15)
    documents: int = Field(ge=0, le=10**12)
    loss_before: float | None = Field(ge=0)
    loss_after: float | None = Field(ge=0)
    steps: int = Field(ge=0)
    seed: int = Field(ge=0)
    deepfusion_version: str = Field(max_length=50)
    files: dict[str, str] = Field(default_factory=dict, max_length=10_000)

    @field_validator("embedding")
    @classmethod
    def _unit(cls, embedding: list[float]) -> list[float]:
        if not abs(math.hypot(*embedding) - 1) < 1e-3:
            raise ValueError("not of length 1")
        return embedding

    @model_validator(mode="after")
    def _encoded_once(self) -> Card:
        if self.encoding != "weights" and self.method != "full":
            raise ValueError(f"an adapter is not written as {self.encoding}")
        return self


def write_card(folder: Path, card: Card) -> Card:
    """Hash all files of an upload and write its card, last and at once: a folder with a card is complete."""
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != CARD}
    card = card.model_copy(update={"files": files})
    write_whole(folder / CARD, card.model_dump_json(indent=1))
    return card


def claim_upload(folder: Path, inputs: Iterable[Path] = ()) -> Path:
    """Where an upload folder goes, all links followed: nothing, an empty folder, or an upload that is there already.

    Args:
        inputs: files and folders that are read; none of them may lie there.

    Raises:
        InputError: as `folders.place_to_replace`, or there is something that is no upload (`not-ours`).
    """
    found = place_to_replace(folder, inputs)
    names = {path.name: path for path in sorted(found.iterdir())} if found.is_dir() else {}
    odd = [
        name
        for name, path in names.items()
        if not FILE_NAMES.fullmatch(name) or path.is_symlink() or not path.is_file()
    ]
    if names and not odd:
        try:
            read_card(found)
        except InputError:
            odd = list(names)
    if odd:
        what = f"the folder holds {odd[0]} and is no upload"
        raise InputError(what, where=folder, fix="choose another --out", code="not-ours")
    claim_file(_made_path(found), lambda text: text.startswith('{"request":'))
    work_key(found.with_name(f".{found.name}.work"))
    return found


def note_made(folder: Path, request: str, made: Path) -> None:
    """Note beside an upload folder what it was asked to be, for nothing of the private text may be said in it.

    Args:
        request: digest of the request.
        made: where the finished upload lies now.
    """
    write_whole(_made_path(folder), json.dumps({"request": request, "card": sha256_file(made / CARD)}) + "\n")


def check_made(folder: Path, request: str) -> None:
    """Check that a finished upload is the answer to a request.

    Raises:
        InputError: it was made by another one, or elsewhere (`another-upload`).
    """
    if _made(folder) != {"request": request, "card": sha256_file(folder / CARD)}:
        what = "a finished upload lies there, made of other data, by other settings or elsewhere"
        raise InputError(
            what,
            where=folder,
            fix=f"choose another --out, or remove this folder and {_made_path(folder).name} beside it",
            code="another-upload",
        )


def is_note(path: Path) -> bool:
    """Whether a file is what `note_made` writes beside an upload."""
    return re.fullmatch(r"\..+\.made\.json", path.name) is not None and path.is_file()


def _made_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.made.json")


def _made(folder: Path) -> object:
    try:
        return json.loads(_made_path(folder).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def read_card(folder: Path) -> Card:
    """The card of an upload.

    Raises:
        InputError: missing, too large, not JSON, or not of the schema; names the field.
    """
    path = folder / CARD
    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            allowed = f"{MAX_CARD_BYTES} bytes"
            raise InputError("the card is too large", where=path, allowed=allowed, code="card-too-large")
        return Card.model_validate_json(path.read_bytes())
    except OSError:
        fix = "deepfusion device train writes one"
        raise InputError("there is no card", where=path, fix=fix, code="card-missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part)[:60] for part in first["loc"])
        said = first["msg"][:200]
        # The card is named here too: who is told why an upload was set aside does not see the path.
        what = f"the card is wrong at {field}: {said}" if field else f"the card is damaged: {said}"
        raise InputError(what, where=path, fix="make the upload again", code="card-invalid") from None


def weights_digest(card: Card) -> str:
    """Digest of the weight files that a checked card names; equals `checkpoints.folder_digest` of the folder."""
    lines = [
        f"{name}\0{digest}\n" for name, digest in sorted(card.files.items()) if name.endswith(".safetensors")
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
