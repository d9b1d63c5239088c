from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from device_models import (
    card,
    make_model,
    save_adapter_upload,
    save_checkpoint,
    save_compact_upload,
    save_tokenizer,
    save_upload,
    unit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepfusion.digests import folder_digest
from deepfusion.errors import InputError
from deepfusion.federation.offer import check_offer, read_offer
from deepfusion.models.compact import FORMAT, open_base, write_delta
from deepfusion.models.loading import load_model
from deepfusion.models.signature import type_signature
from deepfusion.records import Card
from deepfusion.sections import Encoding
from deepfusion.uploads.adopt import adopt_checkpoint
from deepfusion.uploads.card import CARD, read_card, weights_digest, write_card
from deepfusion.uploads.check import check_upload

LIMIT = 10**8


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "d00"
    save_upload(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def compact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compact") / "d00"
    save_compact_upload(folder, base, "delta4")
    return folder


@pytest.fixture
def upload(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "d00"))


def codes(folder: Path, **options: object) -> set[str]:
    return {problem.code for problem in check_upload(folder, **{"max_bytes": LIMIT, **options})}


def sign_again(folder: Path) -> None:
    """Make the card agree with the changed files, as a liar would."""
    write_card(folder, read_card(folder))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "olmo", "bloom"])
def test_a_sound_upload_has_no_problems(kind: str, tmp_path: Path) -> None:
    save_upload(tmp_path / "d", kind)
    assert check_upload(tmp_path / "d", LIMIT) == []


def test_a_sharded_upload_is_sound(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    make_model().save_pretrained(folder, max_shard_size="10KB")
    save_tokenizer(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    write_card(folder, card(folder, "d"))
    assert check_upload(folder, LIMIT) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_an_adapter_upload_is_sound(kind: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", kind)
    save_adapter_upload(tmp_path / "d", tmp_path / "base")
    assert check_upload(tmp_path / "d", LIMIT) == []
    assert codes(tmp_path / "d", bases={str(tmp_path / "base")}) == set()
    assert codes(tmp_path / "d", bases=["other"]) == {"unknown-base"}


def test_the_card_survives_the_disk(upload: Path) -> None:
    before = read_card(upload)
    assert write_card(upload, before) == before == read_card(upload)
    assert weights_digest(before) == folder_digest(upload)
    assert CARD not in before.files


def test_a_card_from_before_there_were_encodings_is_one_of_plain_weights(upload: Path) -> None:
    values = read_card(upload).model_dump(exclude={"encoding", "encoding_error"})
    assert Card.model_validate(values) == read_card(upload)


def test_the_card_takes_no_other_field_and_no_odd_device(upload: Path) -> None:
    values = read_card(upload).model_dump()
    for change in (
        {"text": "private"},
        {"device": "../x"},
        {"device": ".."},
        {"device": ""},
        {"embedding": [3.0, 4.0]},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            Card.model_validate(values | change)


@pytest.mark.parametrize("encoding", ["delta8", "delta4"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "olmo", "bloom"])
def test_a_compact_upload_is_sound_and_of_the_type_of_full_ones(
    kind: str, encoding: Encoding, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "base", kind)
    model = save_compact_upload(tmp_path / "d", tmp_path / "base", encoding)
    assert codes(tmp_path / "d", bases={str(tmp_path / "base")}) == set()
    assert codes(tmp_path / "d", bases=["other"]) == {"unknown-base"}
    check_offer(read_offer(tmp_path / "d"), "d", LIMIT)
    model.save_pretrained(tmp_path / "full")
    save_tokenizer(tmp_path / "full")
    assert (
        type_signature(tmp_path / "full", read_card(tmp_path / "d").base_digest)
        == read_card(tmp_path / "d").signature
    )
    stored = (tmp_path / "d" / "delta.safetensors").stat().st_size / (
        tmp_path / "full" / "model.safetensors"
    ).stat().st_size
    assert stored < {"delta8": 0.5, "delta4": 0.4}[encoding]  # of a model so small the header takes much


def test_an_upload_without_any_change_is_sound(base: Path, tmp_path: Path) -> None:
    save_compact_upload(tmp_path / "d", base)
    write_delta(tmp_path / "d", load_model(base).state_dict(), open_base(str(base)), "delta8")
    sign_again(tmp_path / "d")
    assert codes(tmp_path / "d") == set()
    assert load_file(tmp_path / "d" / "delta.safetensors") == {}


def rewrite(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return mutate


def retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return mutate


def link(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("/etc/hostname")


def hard_link(folder: Path) -> None:
    os.link(folder / "config.json", folder.parent / "elsewhere.json")


def truncate(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if name.endswith("c_attn.weight"))


# What a sender may do to the files before they sign them.
SIGNED = {
    "non-finite": retensor(lambda t: t[first(t)].view(-1)[5:6].fill_(float("nan"))),
    "shape-mismatch": retensor(lambda t: t.update({first(t): t[first(t)][:, :-1].contiguous()})),
    "dtype": retensor(lambda t: t.update({first(t): t[first(t)].to(torch.int32)})),
    "tensor-missing": retensor(lambda t: t.pop(first(t))),
    "tensor-extra": retensor(lambda t: t.update({"backdoor": torch.zeros(2)})),
    "tied-weights-differ": retensor(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
    "weights-damaged": truncate,
    "absurd-config": rewrite("config.json", lambda c: c.update(n_embd=10**9)),
    "unknown-architecture": rewrite("config.json", lambda c: c.update(model_type="ctrl")),
    "remote-code": rewrite("config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil--x.Y"})),
    "signature-mismatch": rewrite("config.json", lambda c: c.update(n_head=4)),
    "bad-json": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "bad-tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "unknown-file": lambda folder: (folder / "notes.docx").write_text("x"),
    "code-file": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80\x04."),
    "weights-extra": lambda folder: shutil.copy(
        folder / "model.safetensors", folder / "adapter_model.safetensors"
    ),
}


@pytest.mark.parametrize("code", SIGNED)
def test_lies_that_are_signed_are_found(code: str, upload: Path) -> None:
    SIGNED[code](upload)
    sign_again(upload)
    assert code in codes(upload)


@pytest.mark.parametrize(
    "values",
    [
        {"n_embd": 2**23, "n_head": 1},
        {"n_layer": 10**9},
        {"n_layer": 256, "n_embd": 2**20},
        {"n_layer": -1},
        {"n_layer": "many"},
        {"vocab_size": 2**24, "n_positions": 2**24},
        {"n_head": 0},
        {"model_type": None},
        {"tokenizer_class": {}, "dtype": "float99"},
    ],
)
def test_absurd_configs_neither_hang_nor_allocate(values: dict, upload: Path) -> None:
    rewrite("config.json", lambda config: config.update(values))(upload)
    sign_again(upload)
    assert codes(upload)


# What may happen to the folder on its way, unsigned.
UNSIGNED = {
    "card-missing": lambda folder: (folder / CARD).unlink(),
    "card-invalid": lambda folder: (folder / CARD).write_text("{]"),
    "card-too-large": lambda folder: (folder / CARD).write_text(" " * (2**20 + 1)),
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "file-missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "file-extra": lambda folder: (folder / "merges.txt").write_text("a b"),
    "digest-mismatch": lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
    "link": link,
    "subfolder": lambda folder: (folder / "deep").mkdir(),
    "special-file": lambda folder: os.mkfifo(folder / "vocab.txt"),
}


@pytest.mark.parametrize("code", UNSIGNED)
def test_damage_is_found(code: str, upload: Path) -> None:
    UNSIGNED[code](upload)
    assert codes(upload) == {code}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the card is damaged: Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b"\xff\xfe\x00", "the card is damaged: Invalid JSON: expected value at line 1 column 1"),
        (b"[]", "the card is damaged: Input should be an object"),
        (b'{"schema_version": 2}', "the card is wrong at schema_version: Input should be 1"),
    ],
)
def test_a_damaged_card_is_one_line_that_names_it(content: bytes, what: str, upload: Path) -> None:
    (upload / CARD).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_card(upload)
    assert str(error.value) == f"{upload / CARD}: {what}; fix: make the upload again [card-invalid]"
    assert [(problem.message, problem.file) for problem in check_upload(upload, LIMIT)] == [(what, CARD)]


def test_sizes_and_links_are_bounded(upload: Path) -> None:
    assert codes(upload, max_bytes=1000) == {"too-large"}
    hard_link(upload)
    assert codes(upload) == {"link"}
    assert codes(upload / "nothing") == {"not-a-folder"}
    alias = upload.with_name("alias")
    alias.symlink_to(upload)
    assert codes(alias) == {"not-a-folder"}


def test_a_header_of_absurd_length_is_not_read(upload: Path) -> None:
    huge_header(upload)
    sign_again(upload)
    assert codes(upload) == {"weights-damaged"}


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"rank_pattern": {"c_attn": 9}},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        {"modules_to_save": ["lm_head"]},
        {"r": 10**9},
        {"r": True},
        {"lora_alpha": float("nan")},
        {"layer_replication": [[0, 10**9]]},
        {"bias": "all"},
        {"use_rslora": "yes"},
    ],
)
def test_only_plain_lora_is_taken(change: dict, base: Path, tmp_path: Path) -> None:
    save_adapter_upload(tmp_path / "d", base)
    rewrite("adapter_config.json", lambda values: values.update(change))(tmp_path / "d")
    sign_again(tmp_path / "d")
    assert codes(tmp_path / "d") == {"bad-adapter-config"}


def test_an_adapter_must_fit_its_base(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    save_adapter_upload(folder, base)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(tensors)
    save_file(tensors | {name: tensors[name][:1].contiguous()}, folder / "adapter_model.safetensors")
    sign_again(folder)
    assert codes(folder) == {"shape-mismatch"}
    renamed = {name.replace("c_attn", "c_other"): tensors[name] for name in tensors}
    save_file(renamed, folder / "adapter_model.safetensors")
    sign_again(folder)
    assert "tensor-extra" in codes(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_card(folder, read_card(folder).model_copy(update={"base_digest": "1" * 64}))
    assert "base-differs" in codes(folder)


def recode(change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        tensors = load_file(folder / "delta.safetensors")
        change(tensors)
        save_file(tensors, folder / "delta.safetensors", metadata=FORMAT | metadata)

    return mutate


BIAS = "transformer.ln_f.bias"
LIES = {
    "negative scale": ("non-finite", recode(lambda t: t[f"{BIAS}.scales"].fill_(-1e-3))),
    "NaN scale": ("non-finite", recode(lambda t: t[f"{BIAS}.scales"].fill_(float("nan")))),
    "infinite scale": ("non-finite", recode(lambda t: t[f"{BIAS}.scales"].fill_(float("inf")))),
    "large scale": ("non-finite", recode(lambda t: t[f"{BIAS}.scales"].fill_(1e6))),
    "a code too few": (
        "shape-mismatch",
        recode(lambda t: t.update({f"{BIAS}.codes": t[f"{BIAS}.codes"][:-1].clone()})),
    ),
    "a code too many": (
        "shape-mismatch",
        recode(lambda t: t.update({f"{BIAS}.codes": torch.zeros(17, dtype=torch.int8)})),
    ),
    "a scale too many": (
        "shape-mismatch",
        recode(lambda t: t.update({f"{BIAS}.scales": torch.zeros(2, dtype=torch.bfloat16)})),
    ),
    "codes of 4 bits": (
        "shape-mismatch",
        recode(lambda t: t.update({f"{BIAS}.codes": torch.zeros(8, dtype=torch.uint8)})),
    ),
    "codes of 32 bits": (
        "dtype",
        recode(lambda t: t.update({f"{BIAS}.codes": torch.zeros(16, dtype=torch.int32)})),
    ),
    "other scales": ("dtype", recode(lambda t: t.update({f"{BIAS}.scales": torch.zeros(1)}))),
    "no scales": ("tensor-missing", recode(lambda t: t.pop(f"{BIAS}.scales"))),
    "no codes": ("tensor-missing", recode(lambda t: t.pop(f"{BIAS}.codes"))),
    "another tensor": (
        "tensor-extra",
        recode(lambda t: t.update({"backdoor.codes": torch.zeros(1, dtype=torch.int8)})),
    ),
    "a tied copy": (
        "tensor-extra",
        recode(lambda t: t.update({"lm_head.weight.codes": torch.zeros(1, dtype=torch.int8)})),
    ),
    "a third part": ("tensor-extra", recode(lambda t: t.update({f"{BIAS}.zeros": torch.zeros(1)}))),
    "plain weights": ("tensor-extra", recode(lambda t: t.update({"weight": torch.zeros(1)}))),
    "another version": ("delta-version", recode(lambda t: None, deepfusion_delta="2")),
    "no header": ("weights-damaged", lambda folder: (folder / "delta.safetensors").write_bytes(b"")),
    "weights too": ("weights-extra", save_checkpoint),
    "another model": ("base-differs", rewrite("config.json", lambda config: config.update(n_embd=32))),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_compact_uploads_are_found(lie: str, base: Path, tmp_path: Path) -> None:
    code, mutate = LIES[lie]
    save_compact_upload(tmp_path / "d", base)
    mutate(tmp_path / "d")
    sign_again(tmp_path / "d")
    assert codes(tmp_path / "d") == {code}


def test_a_compact_upload_must_fit_its_card_and_its_base(base: Path, upload: Path, tmp_path: Path) -> None:
    save_compact_upload(tmp_path / "d", base)
    honest = read_card(tmp_path / "d")
    for change, code in (
        ({"encoding": "weights"}, "encoding-mismatch"),
        ({"encoding": "delta4"}, "shape-mismatch"),
        ({"base_digest": "1" * 64}, "base-differs"),
        ({"base_digest": ""}, "base-differs"),
        ({"base": "nowhere"}, "no-model"),
        ({"base": "tiny-gpt2"}, "base-differs"),
    ):
        write_card(tmp_path / "d", honest.model_copy(update=change))
        assert code in codes(tmp_path / "d"), change
    write_card(upload, read_card(upload).model_copy(update={"encoding": "delta8"}))
    assert codes(upload) == {"encoding-mismatch"}
    write_card(tmp_path / "d", honest.model_copy(update={"method": "lora"}))
    assert codes(tmp_path / "d") == {"card-invalid"}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_in_place_of_a_change_end_in_a_verdict(data: st.DataObject, compact: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(compact, Path(scratch) / "d00"))
        content = bytearray((folder / "delta.safetensors").read_bytes())
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
        (folder / "delta.safetensors").write_bytes(
            data.draw(st.sampled_from([content, content[start:], content[:start]]))
        )
        sign_again(folder)
        assert all(problem.code and problem.message for problem in check_upload(folder, LIMIT))


def test_an_adapter_and_full_weights_say_so(upload: Path) -> None:
    write_card(upload, read_card(upload).model_copy(update={"method": "lora"}))
    assert codes(upload) == {"method-mismatch"}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_found_and_nothing_is_raised(data: st.DataObject, sound: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(sound, Path(scratch) / "d00"))
        name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
        content = bytearray((folder / name).read_bytes())
        position = data.draw(st.integers(0, min(len(content), 4000) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
        (folder / name).write_bytes(content)
        signed = name != CARD and data.draw(st.booleans())
        if signed:
            sign_again(folder)
        problems = check_upload(folder, LIMIT)
        assert all(problem.code and problem.message for problem in problems)
        assert signed or problems or name == CARD


@settings(max_examples=40, deadline=None)
@given(
    name=st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=40)
)
def test_no_other_file_slips_in(name: str, sound: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(sound, Path(scratch) / "d00"))
        if name in (".", "..") or (folder / name).exists() or len(name.encode()) > 255:
            return
        (folder / name).write_bytes(b"{}")
        assert codes(folder) & {"unknown-file", "code-file", "file-extra"}


def test_a_plain_checkpoint_is_adopted(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "plain", "llama", dtype=torch.bfloat16)
    adopted = adopt_checkpoint(tmp_path / "plain", tmp_path / "d0", "d0", np.array(unit(1)), "hashing")
    assert check_upload(tmp_path / "d0", LIMIT) == []
    assert (adopted.base_digest, adopted.tokens, adopted.loss_after) == ("", 0, None)
    stored = load_file(tmp_path / "d0" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_with_pickled_weights_is_not_adopted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").rename(tmp_path / "plain" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights.*weights-missing"):
        adopt_checkpoint(tmp_path / "plain", tmp_path / "d0", "d0", np.array(unit(1)), "hashing")
