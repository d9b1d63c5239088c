from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from device_models import save_adapter_upload, save_checkpoint, save_upload, unit

from deepfusion.config import parse_config
from deepfusion.digests import folder_digest
from deepfusion.errors import InputError
from deepfusion.schema import Config
from deepfusion.stages import registry
from deepfusion.uploads.card import read_card, write_card


def run(root: Path, config: Config | None = None) -> tuple[list[dict], dict[str, list[dict]]]:
    registry.run(config or parse_config({}), {"uploads": root / "uploads"}, root)
    return json.loads((root / "registry.json").read_text()), json.loads((root / "rejected.json").read_text())


def test_sound_uploads_are_registered_with_what_later_stages_read(tmp_path: Path) -> None:
    for seed, name in enumerate(["d00", "d01"]):
        save_upload(tmp_path / "uploads" / name, seed=seed, tokens=7 + seed)
    accepted, rejected = run(tmp_path)
    assert rejected == {}
    assert [(entry["device"], entry["tokens"], entry["method"]) for entry in accepted] == [
        ("d00", 7, "full"),
        ("d01", 8, "full"),
    ]
    assert accepted[0]["signature"] == accepted[1]["signature"]
    assert accepted[0]["digest"] == folder_digest(tmp_path / "uploads" / "d00")
    assert accepted[0]["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "uploads" / "d00").iterdir()
    )


def test_bad_uploads_are_set_aside_and_the_others_count(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    for seed, name in enumerate(["d00", "d01", "d02"]):
        save_upload(uploads / name, seed=seed)
    (uploads / "d00" / "model.safetensors").write_bytes(b"")
    (uploads / "d01" / "card.json").write_text("nonsense")
    (uploads / "stray.txt").write_text("no folder")
    accepted, rejected = run(tmp_path)
    assert [entry["device"] for entry in accepted] == ["d02"]
    assert {name: problems[0]["code"] for name, problems in rejected.items()} == {
        "d00": "digest-mismatch", "d01": "card-invalid", "stray.txt": "not-a-folder",
    }  # fmt: skip
    assert set(rejected["d00"][0]) == {"code", "message", "file"}


def test_an_upload_counts_once(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    save_upload(uploads / "d00")
    shutil.copytree(uploads / "d00", uploads / "again")
    twin = Path(shutil.copytree(uploads / "d00", uploads / "twin"))
    write_card(twin, read_card(twin).model_copy(update={"device": "twin"}))
    lost = uploads / "lost"
    save_upload(lost, seed=3)
    write_card(lost, read_card(lost).model_copy(update={"device": "elsewhere"}))
    accepted, rejected = run(tmp_path)
    assert [entry["device"] for entry in accepted] == ["d00"]
    assert {name: problems[0]["code"] for name, problems in rejected.items()} == {
        "again": "duplicate-device", "twin": "duplicate-weights", "lost": "folder-name",
    }  # fmt: skip


def test_embeddings_that_cannot_be_compared_are_set_aside(tmp_path: Path) -> None:
    for seed, size in enumerate([8, 8, 4]):
        save_upload(tmp_path / "uploads" / f"d{seed}", seed=seed, embedding=unit(seed, size))
    accepted, rejected = run(tmp_path)
    assert [entry["device"] for entry in accepted] == ["d0", "d1"]
    assert rejected["d2"][0]["code"] == "embedding-differs"


def test_an_adapter_needs_a_base_that_the_config_names(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_checkpoint(base)
    save_adapter_upload(tmp_path / "uploads" / "d0", base)
    with pytest.raises(InputError, match="unknown-base"):
        run(tmp_path)
    by_type, _ = run(tmp_path, parse_config({"device": {"types": [str(base)]}}))
    by_device, _ = run(tmp_path, parse_config({"devices": [{"id": "d0", "type": str(base)}]}))
    assert by_type == by_device
    assert by_type[0]["base"] == str(base)


def test_uploads_may_be_too_large_and_none_may_be_left(tmp_path: Path) -> None:
    save_upload(tmp_path / "uploads" / "d0")
    with pytest.raises(InputError, match="too-large"):
        run(tmp_path, parse_config({"federation": {"max_upload_bytes": 1000}}))
    with pytest.raises(InputError, match="no-uploads"):
        run(tmp_path / "nothing")
