"""The card of an upload: how it is written, read and claimed. Needs no model framework, so that moving uploads does not
either."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.folders import claim_file, place_to_replace, work_key, write_whole
from deepfusion.records import Card, invalid

CARD = "card.json"
MAX_CARD_BYTES = 2**20
MAX_JSON_BYTES = 64 * 2**20

FILE_NAMES = re.compile(
    r"(card|config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors|(adapter_model|delta)\.safetensors"
    r"|vocab\.txt|merges\.txt|\w+\.model|chat_template\.jinja|README\.md"
)


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
        found = invalid(error, path, code="card-invalid")
        # The card is named here too: who is told why an upload was set aside does not see the path.
        said = (
            f"the card is wrong at {found.what}"
            if error.errors()[0]["loc"]
            else f"the card is damaged: {found.what}"
        )
        raise InputError(said, where=path, fix="make the upload again", code="card-invalid") from None


def weights_digest(card: Card) -> str:
    """Digest of the weight files that a checked card names; equals `checkpoints.folder_digest` of the folder."""
    lines = [
        f"{name}\0{digest}\n" for name, digest in sorted(card.files.items()) if name.endswith(".safetensors")
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
