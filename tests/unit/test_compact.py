"""Compact uploads: the bound of the error for any values, the packing, what a device writes, and what is measured of
it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_models import entry, save_checkpoint, save_compact_upload, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

from deepfusion.config import parse_config
from deepfusion.errors import InputError
from deepfusion.models.compact import (
    BLOCK,
    decode,
    encode,
    open_base,
    pack,
    stored_tensors,
    unpack,
    write_delta,
)
from deepfusion.models.loading import load_model
from deepfusion.records import Registry
from deepfusion.schema import Config
from deepfusion.sections import DeviceSpec, Encoding
from deepfusion.stages import evaluate
from deepfusion.stages.device import train_device
from deepfusion.text.rows import Document
from deepfusion.text.sources import write_jsonl
from deepfusion.uploads.card import read_card, write_card
from deepfusion.uploads.check import check_upload

ENCODINGS: tuple[Encoding, ...] = ("delta8", "delta4")
SHAPES = st.one_of(arrays.array_shapes(max_dims=3, max_side=70), st.just((0,)), st.just((3, 0)))
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Whole ranges at once: denormal beside huge numbers, and numbers of one magnitude, as changes of weights are.
VALUES = st.one_of(
    SHAPES.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=FINITE)),
    st.tuples(SHAPES, st.integers(-149, 127), st.integers(0, 2**32 - 1)).map(
        lambda drawn: np.ldexp(np.random.default_rng(drawn[2]).uniform(-1, 1, drawn[0]), drawn[1]).astype(
            np.float32
        )
    ),
)


def errors_in_scales(values: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """|decoded - true| of each value over the scale of its block, computed exactly; 0/0 counts as 0."""
    codes, scales = encode(values, encoding)
    expected = stored_tensors("w", tuple(values.shape), encoding)
    assert {
        "w.codes": (tuple(codes.shape), codes.dtype),
        "w.scales": (tuple(scales.shape), scales.dtype),
    } == expected
    error = (decode(codes, scales, tuple(values.shape)).double() - values.double()).abs().flatten()
    own = scales.double().repeat_interleave(BLOCK)[: len(error)]
    assert (error[own == 0] == 0).all()
    return error / own.clamp(min=1e-300)


@settings(max_examples=300, deadline=None)
@given(values=VALUES, encoding=st.sampled_from(ENCODINGS))
def test_no_value_is_further_off_than_half_a_scale(values: np.ndarray, encoding: Encoding) -> None:
    assert (errors_in_scales(torch.from_numpy(values), encoding) <= 0.5).all()


@settings(max_examples=200, deadline=None)
@given(
    peak=st.floats(2.0**-140, 2.0**127, width=32),
    places=st.lists(st.integers(0, 254), min_size=1, max_size=20),
    encoding=st.sampled_from(ENCODINGS),
)
def test_values_halfway_between_two_codes(peak: float, places: list[int], encoding: Encoding) -> None:
    """The hardest values: ties, and their neighbours among the float32 numbers."""
    _, scales = encode(torch.tensor([peak]), encoding)
    ties = (
        torch.tensor(places, dtype=torch.double) % {"delta8": 127, "delta4": 7}[encoding] + 0.5
    ) * scales.double()
    near = ties.float().clamp(max=peak)
    values = torch.cat([torch.tensor([peak]), near, near.nextafter(torch.zeros(1)), -near])
    assert (errors_in_scales(values, encoding) <= 0.5).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_magnitude_that_a_number_can_have(encoding: Encoding) -> None:
    """A block for each power of two, from the smallest denormal number on, and blocks with the largest of all."""
    draw = np.random.default_rng(0).uniform(-1, 1, (277, BLOCK))
    ranges = torch.from_numpy(np.ldexp(draw, np.arange(-149, 128)[:, None]).astype(np.float32))
    huge = torch.finfo(torch.float32).max * torch.linspace(0.5, 1, 10_000).repeat_interleave(BLOCK)
    for values in (ranges, huge):
        assert (errors_in_scales(values, encoding) <= 0.5).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_more_values_than_are_encoded_at_once(encoding: Encoding) -> None:
    values = torch.randn(2**22 + 65, generator=torch.Generator().manual_seed(0))
    assert float(errors_in_scales(values, encoding).max()) <= 0.5
    codes, scales = encode(values[-65:], encoding)
    assert torch.equal(
        decode(codes, scales, (65,)), decode(*encode(values, encoding), tuple(values.shape))[-65:]
    )


@given(shape=SHAPES, encoding=st.sampled_from(ENCODINGS))
def test_zeros_stay_zeros(shape: tuple[int, ...], encoding: Encoding) -> None:
    zeros = torch.zeros(shape)
    assert torch.equal(decode(*encode(zeros, encoding), shape), zeros)


@given(codes=arrays.arrays(np.int8, st.integers(0, 200), elements=st.integers(-8, 7)))
def test_packing_loses_nothing(codes: np.ndarray) -> None:
    packed = pack(torch.from_numpy(codes))
    assert (packed.dtype, len(packed)) == (torch.uint8, (len(codes) + 1) // 2)
    assert torch.equal(unpack(packed, len(codes)), torch.from_numpy(codes))


@given(raw=st.binary(max_size=300), scale=st.floats(0, 2.0**120, width=32))
def test_any_codes_decode_to_finite_values(raw: bytes, scale: float) -> None:
    packed = torch.tensor(list(raw), dtype=torch.uint8)
    for codes, count in ((packed, 2 * len(raw)), (packed.view(torch.int8), len(raw))):
        scales = torch.full((-(-count // BLOCK),), scale).to(torch.bfloat16)
        assert decode(codes, scales, (count,)).isfinite().all()


def trained(base: Path, out: Path, **device: Any) -> None:
    """A device that trains two steps on a few sentences."""
    config = parse_config({"precision": "fp32", "device": {"steps": 2, "batch_size": 2, **device}})
    texts = [
        Document("", f"the cat sat on the mat and ran over the hill {number}", "") for number in range(6)
    ]
    train_device(
        config, DeviceSpec(id=out.name, type=str(base)), texts[1:], texts[:1], out, out.with_name("work")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_hands_in_the_same_model_in_fewer_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_checkpoint(base, "llama").to(dtype).save_pretrained(base)
    trained(base, tmp_path / "weights" / "d")
    truth, card = (
        load_file(tmp_path / "weights" / "d" / "model.safetensors"),
        read_card(tmp_path / "weights" / "d"),
    )
    before = load_file(base / "model.safetensors")
    assert (card.encoding, card.encoding_error) == ("weights", 0)
    for encoding in ENCODINGS:
        folder = tmp_path / encoding / "d"
        trained(base, folder, upload=encoding)
        compact = read_card(folder)
        assert check_upload(folder, 10**8, {str(base)}) == []
        assert (compact.encoding, compact.base, compact.signature) == (encoding, str(base), card.signature)
        assert compact.loss_after == card.loss_after
        assert {p.name for p in (tmp_path / "weights" / "d").iterdir()} ^ {
            p.name for p in folder.iterdir()
        } == {"model.safetensors", "delta.safetensors"}
        decoded = evaluate._load(folder, "fp32").state_dict()
        for name, tensor in truth.items():
            error = float((decoded[name] - tensor.float()).abs().max())
            assert error <= compact.encoding_error + float(tensor.abs().max()) * torch.finfo(dtype).eps
        moved = max(float((truth[name].float() - before[name].float()).abs().max()) for name in truth)
        assert 0 < compact.encoding_error < moved / 2


def test_a_training_that_diverged_is_said_at_the_device(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base")
    model = load_model(tmp_path / "base")
    model.transformer.ln_f.bias.data[3] = float("nan")
    with pytest.raises(InputError, match=r"ln_f\.bias.*non-finite"):
        write_delta(tmp_path, model.state_dict(), open_base(str(tmp_path / "base")), "delta8")


def test_a_base_in_another_layout_is_said_before_the_training(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_checkpoint(base)
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.ln_f.gamma"] = tensors.pop("transformer.ln_f.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"ln_f\.weight.*base-layout"):
        trained(base, tmp_path / "d", upload="delta8")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"device": {"upload": "delta8", "method": "lora"}},
        {"device": {"upload": "delta4", "method": "qlora"}},
        {"device": {"upload": "delta8"}, "devices": [{"type": "gpt2"}, {"type": "gpt2", "method": "lora"}]},
    ],
)
def test_adapters_are_not_written_as_changes(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"device\.upload.*method full.*bad-value"):
        parse_config(values)


def test_a_compact_upload_is_measured_as_the_model_that_it_stands_for(tmp_path: Path) -> None:
    base, uploads = tmp_path / "base", tmp_path / "uploads"
    save_checkpoint(base)
    model = save_compact_upload(uploads / "d0", base)
    model.save_pretrained(uploads / "d1")
    save_tokenizer(uploads / "d1")
    write_card(
        uploads / "d1", read_card(uploads / "d0").model_copy(update={"device": "d1", "encoding": "weights"})
    )
    write_jsonl(
        [Document("", f"the cat ran over hill {number}", "animals") for number in range(8)],
        tmp_path / "test.jsonl",
    )
    Registry([entry(name, type="gpt2") for name in ("d0", "d1")]).write(tmp_path / "registry.json")
    config = Config.model_validate(
        {"jobs": 1, "precision": "fp32", "data": {"test": str(tmp_path / "test.jsonl")}}
    )
    evaluate.run(config, {"uploads": uploads, "registry": tmp_path / "registry.json"}, tmp_path / "out")
    found = [
        json.loads((tmp_path / "out" / "units" / "device" / name / "measured.json").read_text())
        for name in ("d0", "d1")
    ]
    losses = [unit["metrics"]["log_perplexity"] for unit in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1]
