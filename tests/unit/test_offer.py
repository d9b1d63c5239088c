"""Offers: what a device says that it hands in, and every reason to refuse it before a byte has moved."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.federation.offer import Offer, OfferedFile, check_offer, parse_offer, read_offer
from deepfusion.records import Card
from deepfusion.uploads.card import CARD, MAX_CARD_BYTES, MAX_JSON_BYTES, write_card

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b'{"version": "1.0"}'}


def make_upload(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """A folder that looks like an upload of the device of its name, as far as moving it goes."""
    folder.mkdir(parents=True)
    for name, content in (FILES if files is None else files).items():
        (folder / name).write_bytes(content)
    card = {
        "device": folder.name, "type": "tiny-gpt2", "model_class": "GPT2LMHeadModel", "signature": "5" * 64,
        "base": "tiny-gpt2",
        "base_digest": "b" * 64, "method": "full", "embedding": [0.6, 0.8], "encoder": "hashing",
        "tokens": 100, "documents": 10,
        "loss_before": 5.0, "loss_after": 4.0, "steps": 3, "seed": 0, "deepfusion_version": "0",
    }  # fmt: skip
    write_card(folder, Card.model_validate(card))
    return folder


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    return make_upload(tmp_path / "clinic")


@pytest.fixture(scope="module")
def offer(tmp_path_factory: pytest.TempPathFactory) -> Offer:
    return read_offer(make_upload(tmp_path_factory.mktemp("uploads") / "clinic"))


def changed(offer: Offer, change: Callable[[dict[str, Any]], object]) -> Offer:
    """The offer as it comes over the network from a device that has changed something in it."""
    values = json.loads(offer.model_dump_json())
    change(values)
    return parse_offer(json.dumps(values))


def refusal(offer: Offer, device: str = "clinic", max_bytes: int = 10**9) -> str:
    with pytest.raises(InputError) as caught:
        check_offer(offer, device, max_bytes)
    return caught.value.code


# What a device offers


def test_offer_lists_every_file_with_size_and_digest(upload: Path) -> None:
    offer = read_offer(upload)
    expected = {path.name: (path.stat().st_size, sha256_file(path)) for path in upload.iterdir()}
    assert {file.name: (file.size, file.sha256) for file in offer.files} == expected
    assert set(expected) == {CARD, *FILES}
    assert offer.size == sum(size for size, _ in expected.values())
    check_offer(offer, "clinic", offer.size)


def test_offer_goes_over_the_network_whole(offer: Offer) -> None:
    assert parse_offer(offer.model_dump_json()) == offer


def test_digest_does_not_depend_on_the_order_of_files(offer: Offer) -> None:
    orders = itertools.permutations(offer.files)
    assert {Offer(card=offer.card, files=list(files)).digest for files in orders} == {offer.digest}


@pytest.mark.parametrize("field", ["name", "size", "sha256"])
def test_digest_is_of_names_sizes_and_contents(offer: Offer, field: str) -> None:
    other = {"name": "vocab.json", "size": 12345, "sha256": "e" * 64}
    assert (
        changed(offer, lambda values: values["files"][1].update({field: other[field]})).digest != offer.digest
    )


def test_same_files_on_another_disk_are_the_same_offer(upload: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(upload, tmp_path / "elsewhere"))
    assert read_offer(copy).digest == read_offer(upload).digest


@pytest.mark.parametrize("name", sorted(FILES))
def test_file_that_changed_since_training_is_noticed(upload: Path, name: str) -> None:
    content = (upload / name).read_bytes()
    (upload / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=name) as caught:
        read_offer(upload)
    assert caught.value.code == "upload-changed"


@pytest.mark.parametrize(("name", "what"), [("config.json", "not there"), ("model.safetensors", "not there")])
def test_missing_file_is_noticed(upload: Path, name: str, what: str) -> None:
    (upload / name).unlink()
    with pytest.raises(InputError, match=what) as caught:
        read_offer(upload)
    assert caught.value.code == "upload-changed"


def test_file_beside_the_upload_is_never_sent(upload: Path) -> None:
    (upload / "private.jsonl").write_text('{"text": "secret"}')
    with pytest.raises(InputError, match=r"private\.jsonl is not named in the card") as caught:
        read_offer(upload)
    assert caught.value.code == "upload-changed"


def test_upload_without_a_card_is_none(upload: Path) -> None:
    (upload / CARD).unlink()
    with pytest.raises(InputError) as caught:
        read_offer(upload)
    assert caught.value.code == "card-missing"


@pytest.mark.parametrize(
    "files", [{}, {"é" * 20: b""}, {"a" * 201: b""}], ids=["card only", "not ASCII", "long name"]
)
def test_folder_that_could_not_be_offered_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(InputError) as caught:
        read_offer(make_upload(tmp_path / "clinic", files))
    assert caught.value.code == "card-invalid"


# What comes over the network

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["card", "files", "name", "size"]), inner)
    ),
    max_leaves=8,
)


@given(st.text() | JSON.map(json.dumps))
@example("")
@example("[" * 100_000)
@example("\ud800")
@example('{"card": "\\ud800", "files": []}')
@example('{"card": {}, "files": [{}, {}]}')
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_offer(text)
    assert caught.value.code == "card-invalid"
    assert len(str(caught.value)) < 1000


PLACES = [
    *([key] for key in ("card", "files")),
    *(["card", key] for key in Card.model_fields),
    *(["files", 0, key] for key in OfferedFile.model_fields),
    ["card", "embedding", 0],
    ["card", "files", "config.json"],
]


@given(st.sampled_from(PLACES), JSON | st.just(int("9" * 4000)))
@example(["files", 0, "name"], "")
@example(["card", "embedding"], [1e308, 1e308])
def test_offer_with_anything_in_one_place_is_read_refused_or_weighed(
    offer: Offer, place: list[str | int], value: Any
) -> None:
    """A stranger may write what he wants: the server answers with an InputError, never with another exception."""

    def change(values: Any) -> None:
        for step in place[:-1]:
            values = values[step]
        values[place[-1]] = value

    with contextlib.suppress(InputError):
        read = changed(offer, change)
        check_offer(read, "clinic", 10**9)
        assert {file.name for file in read.files} == {CARD, *FILES}
        assert read.card.device == "clinic"


@pytest.mark.parametrize("size", [-1, 10**15 + 1, int("9" * 4300), 1.5, "large", None])
def test_sizes_that_no_file_has_are_refused(offer: Offer, size: Any) -> None:
    with pytest.raises(InputError, match=r"files\.0\.size"):
        changed(offer, lambda values: [file.update(size=size) for file in values["files"]])


@pytest.mark.parametrize("where", [[], ["card"], ["files", 0]])
def test_unknown_fields_are_refused(offer: Offer, where: list[str | int]) -> None:
    def change(values: Any) -> None:
        for step in where:
            values = values[step]
        values["extra"] = 1

    with pytest.raises(InputError, match="extra"):
        changed(offer, change)


# Every refusal


def test_upload_of_another_name_is_refused(offer: Offer) -> None:
    with pytest.raises(InputError, match="--id bank") as caught:
        check_offer(offer, "bank", 10**9)
    assert caught.value.code == "folder-name"


def test_file_twice_is_refused(offer: Offer) -> None:
    assert (
        refusal(changed(offer, lambda values: values["files"].append(values["files"][0]))) == "card-invalid"
    )


@pytest.mark.parametrize("name", [CARD, *FILES])
def test_file_that_is_left_out_is_refused(offer: Offer, name: str) -> None:
    left = [file for file in offer.files if file.name != name]
    assert refusal(Offer(card=offer.card, files=left)) == "card-invalid"


def test_file_that_the_card_does_not_name_is_refused(offer: Offer) -> None:
    more = OfferedFile(name="vocab.json", size=2, sha256="0" * 64)
    assert refusal(Offer(card=offer.card, files=[*offer.files, more])) == "card-invalid"


@given(st.sets(st.sampled_from([CARD, *FILES, "vocab.json", "merges.txt", "../config.json"]), min_size=2))
def test_files_must_be_exactly_those_of_the_card(offer: Offer, names: set[str]) -> None:
    digests = {CARD: "c" * 64, **offer.card.files}
    files = [OfferedFile(name=name, size=1, sha256=digests.get(name, "0" * 64)) for name in names]
    listed = Offer(card=offer.card, files=files)
    if names == {CARD, *FILES}:
        check_offer(listed, "clinic", 10**9)
    else:
        assert refusal(listed) == "card-invalid"


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/passwd",
        "a/b.json",
        "model.bin",
        "run.py",
        "config.json ",
        ".card.json.part",
        "CONFIG.JSON",
    ],
)
def test_names_that_no_upload_has_are_refused(offer: Offer, name: str) -> None:
    card = offer.card.model_copy(update={"files": {**offer.card.files, name: "0" * 64}})
    more = OfferedFile(name=name, size=2, sha256="0" * 64)
    assert refusal(Offer(card=card, files=[*offer.files, more])) == "unknown-file"


@pytest.mark.parametrize(("name", "limit"), [(CARD, MAX_CARD_BYTES), ("config.json", MAX_JSON_BYTES)])
def test_only_weights_may_be_large(offer: Offer, name: str, limit: int) -> None:
    def sized(size: int) -> Offer:
        files = [
            file.model_copy(update={"size": size}) if file.name == name else file for file in offer.files
        ]
        return Offer(card=offer.card, files=files)

    check_offer(sized(limit), "clinic", 10**9)
    assert refusal(sized(limit + 1)) == "file-too-large"


def test_file_of_another_digest_is_refused(offer: Offer) -> None:
    files = [
        file.model_copy(update={"sha256": "0" * 64}) if file.name != CARD else file for file in offer.files
    ]
    assert refusal(Offer(card=offer.card, files=files)) == "digest-mismatch"


def test_upload_over_the_limit_is_refused(offer: Offer) -> None:
    check_offer(offer, "clinic", offer.size)
    assert refusal(offer, max_bytes=offer.size - 1) == "too-large"
