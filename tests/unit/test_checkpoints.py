"""Streaming checkpoint I/O: what is written is read back, means are means, damage is a clear error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepfusion.digests import folder_digest, sha256_file
from deepfusion.errors import InputError
from deepfusion.models.checkpoints import (
    TensorReader,
    TensorWriter,
    check_same_tensors,
    copy_tokenizer,
    mean_of,
    mean_tensor,
)

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 2**30) -> Path:
    with TensorWriter(folder, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


@QUICK
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]),
    shard_bytes=st.integers(1, 400),
)
def test_what_is_written_is_read_back_in_any_sharding(tmp_path_factory, sizes, dtype, shard_bytes):
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {f"t{i}": torch.arange(2 * size).reshape(2, size).to(dtype) for i, size in enumerate(sizes)}
    write(folder, tensors, shard_bytes)
    with TensorReader(folder) as reader:
        assert reader.names() == sorted(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(reader.get(name), tensor)
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.dtype(name) == dtype
    assert not list(folder.glob("*.part"))


def test_small_checkpoint_is_one_file_and_a_large_one_is_indexed_shards(tmp_path):
    tensors = {name: torch.ones(100) for name in "abc"}
    one = write(tmp_path / "one", tensors)
    assert [path.name for path in one.iterdir()] == ["model.safetensors"]
    many = write(tmp_path / "many", tensors, shard_bytes=400)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate("abc", 1)
    }
    assert index["metadata"]["total_size"] == 1200
    assert all(list(load_file(many / file)) == [name] for name, file in index["weight_map"].items())


def test_slices_that_share_storage_can_be_written(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    reader = TensorReader(write(tmp_path, {"rows": whole[1:], "columns": whole[:, :2], "turned": whole.T}))
    assert torch.equal(reader.get("rows"), whole[1:])
    assert torch.equal(reader.get("columns"), whole[:, :2])
    assert torch.equal(reader.get("turned"), whole.T)


def write_twice(folder: Path) -> None:
    with TensorWriter(folder, shard_bytes=1) as writer:
        writer.add("a", torch.ones(3))
        writer.add("a", torch.ones(3))


def test_failed_block_leaves_no_weights(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_twice(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pickled_missing_and_damaged_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="no weights"):
        TensorReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="pickled"):
        TensorReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="weights-damaged"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", 3])
def test_index_cannot_reach_outside_of_its_folder(tmp_path, file):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "upload"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InputError, match="weights-index"):
        TensorReader(folder)


@QUICK
@given(
    text=st.text(max_size=30)
    | st.sampled_from(["[]", "{}", "1", '{"weight_map": []}', '{"weight_map": {"a": [1]}}'])
)
def test_any_broken_index_is_an_input_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError):
        TensorReader(tmp_path)


def test_index_that_names_a_missing_shard_is_refused(tmp_path):
    folder = write(tmp_path, {name: torch.ones(4) for name in "ab"}, shard_bytes=1)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="weights-damaged"):
        TensorReader(folder)


def test_asking_for_an_unknown_tensor_is_an_input_error(tmp_path):
    reader = TensorReader(write(tmp_path, {"a": torch.ones(1)}))
    with pytest.raises(InputError, match="no tensor b"):
        reader.get("b")


@QUICK
@given(
    count=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_streaming_mean_is_the_mean_cast_once(tmp_path_factory, count, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 5, 3, generator=generator).to(dtype)
    folder = tmp_path_factory.mktemp("means")
    readers = [TensorReader(write(folder / str(i), {"w": value})) for i, value in enumerate(values)]
    mean = mean_tensor(readers, "w")
    exact = values.double().mean(0)
    assert mean.dtype == dtype
    # One rounding to the dtype, half a unit in the last place, and the fp32 noise of the sum.
    torch.testing.assert_close(mean.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=2e-6)


@QUICK
@given(weights=st.lists(st.floats(1, 1e9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_weighted_mean_is_the_weighted_mean(weights, seed):
    values = torch.randn(len(weights), 7, generator=torch.Generator().manual_seed(seed))
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    mean = mean_of(iter(values), weights, torch.float32)
    torch.testing.assert_close(mean.double(), (shares[:, None] * values.double()).sum(0), rtol=0, atol=4e-6)


@QUICK
@given(
    count=st.integers(1, 11),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_mean_of_identical_tensors_is_bit_identical(tmp_path_factory, count, seed, dtype):
    value = torch.randn(17, generator=torch.Generator().manual_seed(seed)).to(dtype)
    reader = TensorReader(write(tmp_path_factory.mktemp("same"), {"w": value}))
    assert torch.equal(mean_tensor([reader] * count, "w"), value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.ones(3)}, "tensor b"),
        ({"a": torch.ones(4), "b": torch.ones(2)}, "tensor a"),
        ({"a": torch.ones(3), "b": torch.ones(2).half()}, "tensor b"),
    ],
)
def test_checkpoints_that_cannot_be_averaged_are_named(tmp_path, other, message):
    first = TensorReader(write(tmp_path / "first", {"a": torch.ones(3), "b": torch.ones(2)}))
    second = TensorReader(write(tmp_path / "second", other))
    with pytest.raises(InputError, match=message):
        check_same_tensors([first, second])
    check_same_tensors([first, first])


def test_digest_depends_on_names_and_contents_of_weights_only(tmp_path):
    folder = write(tmp_path / "a", {"w": torch.ones(2)})
    digest = folder_digest(folder)
    (folder / "README.md").write_text("card")
    assert folder_digest(folder) == digest == folder_digest(write(tmp_path / "b", {"w": torch.ones(2)}))
    assert folder_digest(write(tmp_path / "c", {"w": torch.zeros(2)})) != digest
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert folder_digest(folder) != digest
    with pytest.raises(InputError):
        folder_digest(tmp_path / "nothing")


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_tokenizer_files_and_nothing_else_are_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    wanted = ["tokenizer.json", "vocab.txt", "merges.txt", "chat_template.jinja", "spiece.model"]
    for name in [*wanted, "config.json", "model.safetensors"]:
        (source / name).write_text(name)
    assert copy_tokenizer(source, tmp_path / "target") == sorted(wanted)
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == sorted(wanted)
    with pytest.raises(InputError, match="tokenizer-missing"):
        copy_tokenizer(tmp_path, tmp_path / "target")
