"""Streaming safetensors I/O on Hugging Face checkpoint folders.

Reading holds one tensor in memory, writing one shard, whatever the size of the checkpoint.
Pickled weights (`.bin`, `.pt`) are never opened: they can run code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deepfusion.errors import InputError
from deepfusion.folders import sync

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "*.model",
)
_PIECE = 2**16
"""Elements that are summed up at once."""
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorReader:
    """The tensors of a checkpoint folder, read one at a time; a context manager.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        InputError: no folder, no safetensors weights, a damaged file or index, or shards and index that do not
            belong together.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._files: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        self._indexed: list[str] = []
        for name in self._shard_names():
            handle = self._open(name)
            self._files[name] = handle
            self._file_of.update(dict.fromkeys(handle.keys(), name))
        if lost := sorted(set(self._indexed) - set(self._file_of)):
            what = f"the index names {len(lost)} tensors that are in no shard, such as {lost[0]}"
            raise InputError(what, where=self.folder / INDEX, code="weights-index")

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, in its stored dtype."""
        return self._handle(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, without reading its data."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of the tensor `name`, without reading its data."""
        code = self._handle(name).get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise InputError(
                f"tensor {name} has dtype {code}",
                where=self.folder,
                allowed=", ".join(_DTYPES),
                code="weights-dtype",
            )
        return _DTYPES[code]

    def close(self) -> None:
        """Lets go of the files; the reader is empty afterwards."""
        self._files.clear()
        self._file_of.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shard_names(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            try:
                tensors = dict(json.loads((self.folder / INDEX).read_text("utf-8"))["weight_map"])
                files, self._indexed = set(tensors.values()), list(tensors)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    "the weight index cannot be read", where=self.folder / INDEX, code="weights-index"
                ) from error
            # An index comes from others: it must not reach outside of its folder.
            if not files or any(
                not isinstance(f, str) or Path(f).name != f or f in (".", "..") for f in files
            ):
                raise InputError(
                    "the weight index names no plain file", where=self.folder / INDEX, code="weights-index"
                )
            self._check_shards(files)
            return sorted(files)
        if (self.folder / WEIGHTS).is_file():
            self._check_shards({WEIGHTS})
            return [WEIGHTS]
        kinds = {
            "*.bin": "only pickled weights, which can run code and are not read",
            "*.pt*": "only pickled weights, which can run code and are not read",
            "*.gguf": "only GGUF weights, which are not read",
            "model*.safetensors": f"shards without {INDEX}",
        }
        raise InputError(
            next((what for pattern, what in kinds.items() if any(self.folder.glob(pattern))), "no weights"),
            where=self.folder,
            allowed=f"{WEIGHTS}, or shards with {INDEX}",
            fix="save it with model.save_pretrained(folder)",
            code="weights-missing",
        )

    def _check_shards(self, files: set[str]) -> None:
        """Another program may read the other of two sets of weights, and part of a set is no model."""
        if lost := sorted(name for name in files if not (self.folder / name).is_file()):
            what = f"the index names {len(lost)} of {len(files)} files that are not there, such as {lost[0]}"
            raise InputError(
                what, where=self.folder, fix="fetch or save the checkpoint again", code="weights-damaged"
            )
        sets = {path.name for path in self.folder.glob("model*.safetensors") if _SHARD.fullmatch(path.name)}
        if extra := sorted(sets - files):
            what = f"weights beside the weights: {', '.join(extra)[:200]}"
            raise InputError(
                what, where=self.folder, fix="remove those that are not of this model", code="weights-extra"
            )

    def _open(self, name: str) -> safe_open:
        path = self.folder / name
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"not a readable safetensors file ({error})", where=path, code="weights-damaged"
            ) from error

    def _handle(self, name: str) -> safe_open:
        if name not in self._file_of:
            raise InputError(f"no tensor {name}", where=self.folder, code="weights-tensor-missing")
        return self._files[self._file_of[name]]


class WholeModel:
    """The tensors of a checkpoint by their names in the whole model; some hub checkpoints leave the trunk's prefix out.

    Args:
        folder: of the checkpoint.
        expected: names of the tensors of the whole model, tied copies left out; what is not stored `names` leaves
            out too.
        prefix: of the trunk.
    """

    def __init__(self, folder: Path | str, expected: Iterable[str], prefix: str) -> None:
        self.folder = Path(folder)
        self._reader = TensorReader(folder)
        stored = set(self._reader.names())
        own = {name: name if name in stored else name.removeprefix(prefix) for name in expected}
        self._stored = {name: stored_name for name, stored_name in own.items() if stored_name in stored}

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._stored)

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, in its stored dtype."""
        return self._reader.get(self._stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, without reading its data."""
        return self._reader.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of the tensor `name`, without reading its data."""
        return self._reader.dtype(self._stored[name])


class TensorWriter:
    """Writes tensors into a checkpoint folder one by one; a context manager.

    `close` leaves `model.safetensors`, or numbered shards and `model.safetensors.index.json`, on disk (fsync'ed).
    If the block of the context manager raises, the unfinished shards are removed.

    Args:
        folder: created if needed.
        shard_bytes: a shard is written out as soon as it holds this many bytes.
    """

    def __init__(self, folder: Path | str, shard_bytes: int = 2 * 1024**3) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._seen: set[str] = set()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a copy of `tensor` (any shape, dtype and device); a name can be added once only."""
        if name in self._seen:
            raise ValueError(f"tensor {name} was added twice")
        self._seen.add(name)
        # A copy of its own: a slice would drag its whole storage along, and safetensors refuses shared storage.
        self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size = tensor.numel() * tensor.element_size()
        self._pending_bytes += size
        self._total_bytes += size
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def close(self) -> None:
        """Writes what is left and gives the files their final names."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            os.replace(self._shards[0][0], self.folder / WEIGHTS)
        else:
            self._write_index()
        sync(self.folder)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            for path, _ in self._shards:
                path.unlink(missing_ok=True)

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.part"
        save_file(self._pending, path, metadata={"format": "pt"})
        sync(path)
        self._shards.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0

    def _write_index(self) -> None:
        weight_map = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(path, self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes, "format": "pt"}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        sync(self.folder / INDEX)


def check_same_tensors(readers: Sequence[TensorReader]) -> None:
    """Checks that checkpoints can be averaged.

    Raises:
        InputError: one differs from the first in the names, shapes or dtypes of its tensors.
    """
    first = readers[0]
    for reader in readers[1:]:
        if odd := set(first.names()) ^ set(reader.names()):
            raise InputError(
                f"tensor {min(odd)} is in one of them only",
                where=f"{first.folder}, {reader.folder}",
                code="tensors-differ",
            )
        for name in first.names():
            here, there = (reader.shape(name), reader.dtype(name)), (first.shape(name), first.dtype(name))
            if here != there:
                raise InputError(
                    f"tensor {name} is {here}",
                    where=reader.folder,
                    allowed=f"{there} as in {first.folder}",
                    code="tensors-differ",
                )


def mean_tensor(readers: Sequence[TensorReader], name: str) -> torch.Tensor:
    """Element-wise mean of one tensor over checkpoints [DF eq. 13], in the first one's dtype."""
    return mean_of((reader.get(name) for reader in readers), [1.0] * len(readers), readers[0].dtype(name))


def mean_of(tensors: Iterable[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Weighted element-wise mean of tensors of one shape, accumulated in fp32 and cast once to `dtype`.

    Holds one fp32 tensor beside the first and the one at hand, however many there are; sums are taken in pieces that
    fit a processor's cache. It sums the differences to the first tensor, so that the mean of identical tensors is
    bit-identical to them.

    Args:
        tensors: at least one.
        weights: one for each, positive; only their ratios count.
    """
    scale = len(weights) / sum(weights)  # weights around 1: equal ones change no bit
    rest = iter(tensors)
    first = next(rest)
    shift = torch.zeros(first.shape, dtype=torch.float32, device=first.device)
    origin, shifts = _pieces(first), _pieces(shift)
    for tensor, weight in zip(rest, weights[1:], strict=True):
        for sum_, here, there in zip(shifts, _pieces(tensor), origin, strict=True):
            sum_.add_((here.float() - there.float()) * (weight * scale))
    mean = torch.empty(first.shape, dtype=dtype, device=first.device)
    for target, start, sum_ in zip(_pieces(mean), origin, shifts, strict=True):
        target.copy_(start.float() + sum_ / len(weights))
    return mean


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.reshape(-1).split(_PIECE)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints 0, 1, ... in a folder, in this order."""
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def tokenizer_files(folder: Path | str) -> list[Path]:
    """The tokenizer files (chat template included) that lie in a checkpoint folder, by name."""
    found = {path for pattern in TOKENIZER_PATTERNS for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(found)


def copy_tokenizer(src: Path | str, dst: Path | str) -> list[str]:
    """Copies the tokenizer files from one checkpoint folder to another and returns their names.

    Raises:
        InputError: `src` holds none.
    """
    files = tokenizer_files(src)
    if not files:
        raise InputError(
            "no tokenizer files", where=src, fix="save the tokenizer there too", code="tokenizer-missing"
        )
    Path(dst).mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, Path(dst) / path.name)
    return [path.name for path in files]
