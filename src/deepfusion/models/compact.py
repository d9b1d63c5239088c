"""Compact uploads: how far training moved each weight from the public checkpoint, in 8 or 4 bits, with a bounded error.

`delta.safetensors` holds two flat tensors for each floating tensor NAME of the model that training changed:

- `NAME.codes`, int8 (delta8), or uint8 with two 4-bit codes a byte, the first in the low half, offset by 8 (delta4);
- `NAME.scales`, bfloat16, one for every `BLOCK` values in row-major order; the last block may be shorter.

A value is code x scale, and its error at most half the scale of its block. Scales are bfloat16 because changes of
1e-5 would fall among the subnormal numbers of float16, and float32 costs another quarter of a bit a weight without
lowering the error. Blocks run over the flattened tensor, so that one tensor has one short block at most, not one a
row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from deepfusion.errors import InputError
from deepfusion.models.architecture import architecture, read_config, stored_dtype
from deepfusion.models.checkpoints import TensorReader, WholeModel
from deepfusion.models.presets import require_plain, resolve
from deepfusion.sections import Encoding

DELTA = "delta.safetensors"
BLOCK = 64
FORMAT = {"deepfusion_delta": "1"}
"""Metadata of the file; another layout gets another number."""

_LARGEST = {"delta8": 127, "delta4": 7}
_CODES = {"delta8": torch.int8, "delta4": torch.uint8}
_PART = 2**16 * BLOCK  # values encoded at once, so that the steps in between take no memory to speak of
_SMALLEST_SCALE = torch.finfo(
    torch.bfloat16
).tiny  # of the subnormal ones the relative error would be unbounded


def encode(values: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of finite values (float32, any shape, n of them).

    Returns:
        int8 [n] or uint8 [ceil(n / 2)], and bfloat16 [ceil(n / BLOCK)].
    """
    parts = [_encode(part, _LARGEST[encoding]) for part in values.flatten().split(_PART)]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return (pack(codes) if encoding == "delta4" else codes), scales


def _encode(flat: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = _blocks(flat)
    peaks = blocks.abs().amax(1)
    # Rounded to the nearest bfloat16 a scale is short by a 256th at most, and largest + 1/2 of it still reach the peak.
    scales = (peaks / largest).to(torch.bfloat16).clamp(min=_SMALLEST_SCALE)
    codes = (blocks / scales.float()[:, None]).round().clamp(-largest, largest).to(torch.int8)
    return codes.flatten()[: flat.numel()], torch.where(peaks > 0, scales, 0)


def decode(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The values that `encode` was given, float32 of that shape, within half a scale. The dtype of the codes says how
    many bits.
    """
    count = torch.Size(shape).numel()
    plain = unpack(codes, count) if codes.dtype == torch.uint8 else codes
    values = _blocks(plain).float().mul_(scales.float()[:, None])  # exact: 8 bits times 8 bits
    return values.flatten()[:count].view(shape)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of -8 to 7 (int8 [n]) a byte: uint8 [ceil(n / 2)]."""
    pairs = (F.pad(codes, (0, codes.numel() % 2)) + 8).to(torch.uint8).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` codes, int8."""
    return torch.stack((packed & 15, packed >> 4), 1).flatten()[:count].to(torch.int8) - 8


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """[ceil(n / BLOCK), BLOCK], zeros at the end."""
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def stored_tensors(
    name: str, shape: tuple[int, ...], encoding: Encoding
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what stands in the file for the tensor `name`."""
    count = torch.Size(shape).numel()
    codes = count if encoding == "delta8" else -(-count // 2)
    return {
        f"{name}.codes": ((codes,), _CODES[encoding]),
        f"{name}.scales": ((-(-count // BLOCK),), torch.bfloat16),
    }


def open_whole(folder: Path | str) -> WholeModel:
    """The tensors of a checkpoint by their names in the whole model.

    Raises:
        InputError: they are not plain weights of its class.
    """
    known = require_plain(folder)
    return WholeModel(folder, known.tensors, known.prefix)


def open_base(type: str) -> WholeModel:
    """The public checkpoint of a model type, to which changes refer.

    Raises:
        InputError: it is stored with other names or shapes than the model has, or quantised: nothing can refer to it.
    """
    folder = resolve(type)
    known = architecture(read_config(folder))
    base = WholeModel(folder, known.tensors, known.prefix)
    stored = {name: base.shape(name) for name in base.names()}
    if odd := sorted(name for name in known.tensors if stored.get(name) != known.tensors[name]):
        fix = "device.upload=weights, or save the checkpoint again with a current transformers"
        raise InputError(f"{odd[0]} is stored in another layout", where=type, fix=fix, code="base-layout")
    require_plain(folder)
    return base


def write_delta(
    folder: Path, trained: Mapping[str, torch.Tensor], base: WholeModel, encoding: Encoding
) -> float:
    """Write `folder`/delta.safetensors: what training changed.

    Args:
        trained: the tensors of the trained model by name, on any device.
        base: where training began.

    Returns:
        The largest error of a weight, before it is cast to the dtype in which the checkpoint is stored.

    Raises:
        InputError: a weight is NaN or infinite, or a tensor of integers was changed.
    """
    stored: dict[str, torch.Tensor] = {}
    largest = 0.0
    for name in base.names():
        before, after = base.get(name), trained[name].detach().cpu()
        if not before.is_floating_point():
            if not torch.equal(before, after):
                what = f"{name} holds integers and was changed"
                raise InputError(what, where=folder, fix="device.upload=weights", code="buffers-differ")
            continue
        change = after.float() - before.float()
        if not change.isfinite().all():
            what, fix = f"{name} holds NaN or infinite values after training", "a lower device.learning_rate"
            raise InputError(what, where=folder, fix=fix, code="non-finite")
        if change.any():
            codes, scales = encode(change, encoding)
            largest = max(largest, float((decode(codes, scales, tuple(change.shape)) - change).abs().max()))
            stored |= {f"{name}.codes": codes, f"{name}.scales": scales}
    save_file(stored, folder / DELTA, metadata=FORMAT)
    return largest


class Delta(TensorReader):
    """The tensors of `delta.safetensors`, read one at a time.

    Attributes:
        metadata: of the file; `FORMAT` if it is one that this version reads.
        changed: names of the tensors of the model that it changes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = dict(self._files[DELTA].metadata() or {})
        self.changed = {name.rpartition(".")[0] for name in self.names()}

    def _shard_names(self) -> list[str]:
        return [DELTA]

    def change(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """By how much the tensor `name` of this shape was changed, float32."""
        return decode(self.get(f"{name}.codes"), self.get(f"{name}.scales"), shape)


class Compact:
    """The whole model that a compact upload stands for: the public checkpoint plus the change, cast once, one tensor
    at a time.

    Args:
        folder: the upload.
        base: model type whose public checkpoint the training began with.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.base, self.delta = open_base(base), Delta(folder)
        self._dtype = stored_dtype(resolve(base))

    def names(self) -> list[str]:
        """Names of all tensors, sorted; tied copies are left out."""
        return self.base.names()

    def dtype(self, name: str) -> torch.dtype:
        """That of an upload of full weights."""
        stored = self.base.dtype(name)
        return self._dtype if stored.is_floating_point else stored

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU."""
        weight = self.base.get(name)
        if name in self.delta.changed:
            weight = self.delta.change(name, tuple(weight.shape)).add_(weight)
        return weight.to(self.dtype(name))
