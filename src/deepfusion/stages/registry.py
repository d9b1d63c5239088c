"""The server's door: every upload is checked, sound ones are registered, the others set aside with the reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.records import Card, Problem, Registry, RegistryEntry, Rejected
from deepfusion.schema import Config
from deepfusion.uploads.card import read_card, weights_digest
from deepfusion.uploads.check import check_upload, read_refusal


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Writes `out`/registry.json, a list of the sound uploads, and `out`/rejected.json, the problems of every other.

    Uploads are one-shot: of several by one device, or of equal weights, the first by name counts.

    Raises:
        InputError: no upload is sound.
    """
    uploads = inputs["uploads"]
    folders = (
        sorted(path for path in uploads.iterdir() if not path.name.startswith("."))
        if uploads.is_dir()
        else []
    )
    specified = config.devices if isinstance(config.devices, list) else []
    bases = {*config.device.types, *(device.type for device in specified)}
    accepted: dict[str, Card] = {}
    rejected: dict[str, list[Problem]] = {}
    for folder in folders:
        refusal = read_refusal(folder)
        problems = [refusal] if refusal else check_upload(folder, config.federation.max_upload_bytes, bases)
        if not problems:
            card = read_card(folder)
            problems = _check_against(folder.name, card, accepted, uploads)
            if not problems:
                accepted[folder.name] = card
                continue
        rejected[folder.name] = problems
        progress.say(f"[registry] {folder.name} set aside: {problems[0].message} [{problems[0].code}]")
    rejected |= _other_embeddings(accepted)
    if not accepted:
        reasons = "; ".join(
            f"{name}: {found[0].message} [{found[0].code}]" for name, found in rejected.items()
        )
        what = f"no sound upload ({reasons[:2000] or 'the folder is empty'})"
        raise InputError(what, where=uploads, code="no-uploads")
    Registry([_entry(uploads / name, card) for name, card in accepted.items()]).write(out / "registry.json")
    Rejected(rejected).write(out / "rejected.json")
    return {
        "accepted": len(accepted),
        "rejected": len(rejected),
        "types": len({card.signature for card in accepted.values()}),
    }


def _check_against(name: str, card: Card, accepted: dict[str, Card], uploads: Path) -> list[Problem]:
    """An upload against those before it."""
    if card.device != name:
        if (uploads / card.device).is_dir():
            return [Problem("duplicate-device", f"another upload of device {card.device}", "card.json")]
        return [
            Problem("folder-name", f"the folder of this upload must be called {card.device}", "card.json")
        ]
    for other, known in accepted.items():
        if weights_digest(known) == weights_digest(card):
            return [Problem("duplicate-weights", f"the same weights as the upload of {other}", "card.json")]
    return []


def _other_embeddings(accepted: dict[str, Card]) -> dict[str, list[Problem]]:
    """Set aside uploads whose embeddings cannot be compared with those of the most."""
    kinds = Counter((card.encoder, len(card.embedding)) for card in accepted.values())
    if len(kinds) < 2:
        return {}
    usual = kinds.most_common(1)[0][0]
    others = [name for name, card in accepted.items() if (card.encoder, len(card.embedding)) != usual]
    for name in others:
        del accepted[name]
    message = f"its embedding is not {usual[0]} of length {usual[1]}, as those of the other uploads"
    return {name: [Problem("embedding-differs", message, "card.json")] for name in others}


def _entry(folder: Path, card: Card) -> RegistryEntry:
    size = sum(path.stat().st_size for path in folder.iterdir())
    return RegistryEntry(**card.model_dump(exclude={"files"}), bytes=size, digest=weights_digest(card))
