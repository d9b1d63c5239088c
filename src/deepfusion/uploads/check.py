"""The upload folder, all that leaves a device: how it is written, and how the server checks it without trusting it."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.models.adapters import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapter_shapes,
    check_adapter_config,
    open_adapter,
)
from deepfusion.models.architecture import Architecture, architecture, read_config
from deepfusion.models.checkpoints import INDEX, TensorReader
from deepfusion.models.compact import DELTA, FORMAT, Compact, stored_tensors
from deepfusion.models.loading import load_tokenizer
from deepfusion.models.presets import PRESETS, base_digest, model_config
from deepfusion.models.signature import type_signature
from deepfusion.records import Card, Problem, Refusal
from deepfusion.uploads.card import CARD, FILE_NAMES, MAX_CARD_BYTES, MAX_JSON_BYTES, read_card

REFUSAL = "refused.json"
MAX_HEADER_BYTES = 16 * 2**20
MAX_VALUE = (
    1e6  # no weight of a sound model comes near; larger ones would drown the other members of a cluster
)

_CODE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|py|pyc|so|sh|npy|npz|joblib)", re.IGNORECASE)
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", ADAPTER_CONFIG)
# Keys that make a loader fetch code, or read the weights as something else.
_FORBIDDEN = {
    *("auto_map", "quantization_config", "custom_pipelines", "trust_remote_code"),
    *("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation"),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Decoder-only classes that build on the meta device without running anything that a config could blow up.
ACCEPTED = (
    *(
        "arcee",
        "bloom",
        "cohere",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
    ),
    *(
        "gpt_neox",
        "gptj",
        "granite",
        "helium",
        "llama",
        "mistral",
        "mpt",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
    ),
    *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
)


def write_refusal(folder: Path, problem: Problem) -> None:
    """Leave in place of an upload why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    Refusal(problem).write(folder / REFUSAL)


def read_refusal(folder: Path) -> Problem | None:
    """Why there is no upload, if that is all that the folder says."""
    if not folder.is_dir() or [path.name for path in folder.iterdir()] != [REFUSAL]:
        return None
    try:
        return Refusal.read(folder / REFUSAL).root
    except InputError as error:
        return Problem(error.code, error.what, REFUSAL)


def check_upload(folder: Path, max_bytes: int, bases: Collection[str] | None = None) -> list[Problem]:
    """Everything that is wrong with an upload that anybody may have sent; empty if it is sound. Never raises.

    The checks run from cheap to dear and stop where going on would be unsafe: the listing, sizes and JSON files before
    any library reads them, all hashes and headers before the architecture, that before the values.

    Args:
        folder: the upload.
        max_bytes: of the whole folder.
        bases: the public checkpoints that an adapter or a compact upload may name, besides presets; None allows any.
    """
    folder = Path(folder)
    for check in (_check_listing, _check_settings, _check_card, _check_weights, _check_loading):
        try:
            problems = list(check(folder, max_bytes, bases))
        except InputError as error:
            problems = [Problem(error.code, error.what, Path(str(error.where or folder)).name)]
        except Exception as error:  # No upload may stop the server, whatever it makes a library do.
            problems = [Problem("unreadable", f"{type(error).__name__}: {str(error)[:200]}", folder.name)]
        if problems:
            return problems
    return []


def _check_listing(folder: Path, max_bytes: int, bases: Collection[str] | None) -> Iterator[Problem]:
    """Names, kinds and sizes, without opening a file."""
    if folder.is_symlink() or not folder.is_dir():
        yield Problem("not-a-folder", "not a folder", folder.name)
        return
    total = 0
    for entry in os.scandir(folder):
        name, info = entry.name, entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(info.st_mode):
            yield Problem("link", "a symbolic link", name)
        elif stat.S_ISDIR(info.st_mode):
            yield Problem("subfolder", "an upload has no subfolders", name)
        elif not stat.S_ISREG(info.st_mode):
            yield Problem("special-file", "not a regular file", name)
        elif info.st_nlink > 1:
            yield Problem("link", "a hard link to another file", name)
        elif _CODE.fullmatch(name):
            yield Problem("code-file", "files that can run code are refused; weights are safetensors", name)
        elif not FILE_NAMES.fullmatch(name):
            yield Problem("unknown-file", "a file that no upload has", name)
        elif not name.endswith(".safetensors") and info.st_size > (
            MAX_CARD_BYTES if name == CARD else MAX_JSON_BYTES
        ):
            yield Problem(
                "card-too-large" if name == CARD else "file-too-large", f"{info.st_size} bytes", name
            )
        total += info.st_size
    if total > max_bytes:
        yield Problem("too-large", f"{total} bytes, allowed are {max_bytes}", folder.name)


def _check_settings(folder: Path, max_bytes: int, bases: Collection[str] | None) -> Iterator[Problem]:
    """The JSON files that libraries act on."""
    for name in _SETTINGS:
        path = folder / name
        if not path.exists():
            if name == "config.json":
                yield Problem("no-config", "there is no config.json", name)
            continue
        try:
            values = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError):
            yield Problem("bad-json", "not valid JSON", name)
            continue
        if not isinstance(values, dict):
            yield Problem("bad-json", "not a JSON object", name)
            continue
        if found := sorted(_FORBIDDEN & set(_keys(values))):
            yield Problem("remote-code", f"{found[0]} is refused", name)
        if name == "config.json":
            yield from _check_config(values)
        if name == ADAPTER_CONFIG and (wrong := check_adapter_config(values)):
            yield Problem("bad-adapter-config", wrong, name)


def _check_config(values: dict[str, Any]) -> Iterator[Problem]:
    """Refuse what would make building the architecture slow, even on the meta device."""
    if values.get("model_type") not in ACCEPTED:
        message = f"model_type is {str(values.get('model_type'))[:60]}, allowed: {', '.join(ACCEPTED)}"
        yield Problem("unknown-architecture", message, "config.json")
    for key, value in values.items():
        limit = 256 if re.fullmatch(r"n(um)?_(hidden_)?layers?", key) else 2**24
        number = isinstance(value, int | float) and "theta" not in key and not abs(value) <= limit
        if number or (isinstance(value, list) and len(value) > 4096):
            yield Problem("absurd-config", f"{key[:60]} is beyond all models", "config.json")


def _check_card(folder: Path, max_bytes: int, bases: Collection[str] | None) -> Iterator[Problem]:
    """The card, and the files against it."""
    card = read_card(folder)
    present = {path.name for path in folder.iterdir()} - {CARD}
    for name in sorted(set(card.files) - present):
        yield Problem("file-missing", "named in the card, but not there", name[:200])
    for name in sorted(present - set(card.files)):
        yield Problem("file-extra", "not named in the card", name)
    for name in sorted(present & set(card.files)):
        if sha256_file(folder / name) != card.files[name]:
            yield Problem("digest-mismatch", "its SHA-256 is not that of the card", name)
    adapter = (folder / ADAPTER_CONFIG).exists()
    if adapter != (card.method != "full"):
        yield Problem("method-mismatch", f"the card says {card.method}", ADAPTER_CONFIG)
    compact = (folder / DELTA).exists()
    if compact != (card.encoding != "weights"):
        yield Problem("encoding-mismatch", f"the card says {card.encoding}", DELTA)
    if (adapter or compact) and bases is not None and card.base not in PRESETS and card.base not in bases:
        yield Problem("unknown-base", f"made from {card.base[:100]!r}, which this server does not use", CARD)


def _check_weights(folder: Path, max_bytes: int, bases: Collection[str] | None) -> Iterator[Problem]:
    """Headers of the weights against the architecture, then every value."""
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, max(0, path.stat().st_size - 8)):
            yield Problem("weights-damaged", "truncated, or with a header of absurd length", path.name)
            return
    if (folder / DELTA).exists():
        yield from _check_delta(folder)
        return
    known = architecture(read_config(folder))
    adapter = (folder / ADAPTER_CONFIG).exists()
    reader = open_adapter(folder) if adapter else TensorReader(folder)
    expected = adapter_shapes(folder, known) if adapter else known.tensors
    used = {ADAPTER} if adapter else _weight_files(folder)
    yield from _check_extra(folder, used)
    names = set(reader.names())
    for name in sorted(set(expected) - names)[:5]:
        yield Problem("tensor-missing", f"there is no {name}", folder.name)
    for name in sorted(names - set(expected) - set(known.tied))[:5]:
        yield Problem("tensor-extra", f"{known.name} has no {name[:200]}", folder.name)
    compared = sorted(names & {*expected, *known.tied})
    problems = [problem for name in compared if (problem := _check_tensor(reader, name, expected, known))]
    yield from problems[:5]


def _check_extra(folder: Path, used: set[str]) -> Iterator[Problem]:
    for extra in sorted({path.name for path in folder.glob("*.safetensors*")} - used):
        yield Problem("weights-extra", "weights beside the weights", extra)


def _check_delta(folder: Path) -> Iterator[Problem]:
    """A compact upload: first the public checkpoint, which bounds the size of each tensor, then the header, then
    every value.
    """
    card = read_card(folder)
    if problems := list(_check_base(card, read_config(folder))):
        yield from problems
        return
    whole = Compact(folder, card.base)
    yield from _check_extra(folder, {DELTA})
    if whole.delta.metadata != FORMAT:
        yield Problem("delta-version", f"not of the layout {FORMAT}", DELTA)
        return
    names, changed = set(whole.delta.names()), []
    for name in whole.names():
        expected = stored_tensors(name, whole.base.shape(name), card.encoding)
        if whole.base.dtype(name).is_floating_point and name in whole.delta.changed:
            changed.append((name, expected))
            if missing := sorted(set(expected) - names):
                yield Problem("tensor-missing", f"there is no {missing[0]}", DELTA)
                return
            names -= set(expected)
    if names:
        yield Problem("tensor-extra", f"{card.model_class} has no {min(names)[:200]}", DELTA)
        return
    for check in (_check_codes, _check_change):  # all headers before the first value
        problems = [problem for name, expected in changed if (problem := check(whole, name, expected))]
        yield from problems[:5]
        if problems:
            return


def _check_codes(
    whole: Compact, name: str, expected: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> Problem | None:
    for part, (shape, dtype) in expected.items():
        if whole.delta.shape(part) != shape:
            return Problem(
                "shape-mismatch",
                f"{part} is {list(whole.delta.shape(part))}, and must be {list(shape)}",
                DELTA,
            )
        if whole.delta.dtype(part) != dtype:
            return Problem("dtype", f"{part} is {whole.delta.dtype(part)}, and must be {dtype}", DELTA)
    return None


def _check_change(
    whole: Compact, name: str, expected: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> Problem | None:
    scales = whole.delta.get(f"{name}.scales")
    if not (scales.isfinite() & (scales >= 0)).all():
        return Problem("non-finite", f"{name} has scales that are negative, infinite or NaN", DELTA)
    low, high = whole.get(name).aminmax()
    if not -MAX_VALUE <= float(low) <= float(high) <= MAX_VALUE:  # NaN fails the comparison too
        return Problem("non-finite", f"{name} holds NaN, infinite or absurdly large values", DELTA)
    return None


def _check_tensor(
    reader: TensorReader, name: str, expected: dict[str, tuple[int, ...]], known: Architecture
) -> Problem | None:
    file = reader.folder.name
    shape = expected[known.tied.get(name, name)]
    if reader.shape(name) != shape:
        return Problem(
            "shape-mismatch", f"{name} is {list(reader.shape(name))}, its config says {list(shape)}", file
        )
    if name in known.buffers:
        return None
    if reader.dtype(name) not in _FLOATS:
        return Problem(
            "dtype", f"{name} is {reader.dtype(name)}, allowed are float32, bfloat16 and float16", file
        )
    tensor = reader.get(name)
    if tensor.numel() and not float(tensor.abs().max()) <= MAX_VALUE:  # NaN fails the comparison too
        return Problem("non-finite", f"{name} holds NaN, infinite or absurdly large values", file)
    if name in known.tied and not torch.equal(tensor, reader.get(known.tied[name])):
        return Problem(
            "tied-weights-differ", f"{name} differs from {known.tied[name]}, with which it is tied", file
        )
    return None


def _check_loading(folder: Path, max_bytes: int, bases: Collection[str] | None) -> Iterator[Problem]:
    """What later stages load: the tokenizer and the generation config; and whether the card tells the truth."""
    card, config = read_card(folder), read_config(folder)
    load_tokenizer(folder)
    if (folder / "generation_config.json").exists():
        GenerationConfig.from_pretrained(folder)
    if card.model_class != architecture(config).name:
        yield Problem(
            "class-mismatch", f"the card says {card.model_class}, the config is of another class", CARD
        )
    if card.method != "full":
        yield from _check_base(card, config)
    if card.signature != type_signature(folder, card.base_digest):
        yield Problem("signature-mismatch", "the model is not of the type that the card says", CARD)


def _check_base(card: Card, config: PretrainedConfig) -> Iterator[Problem]:
    """The public checkpoint that an adapter or a compact upload needs, as this machine has it."""
    if base_digest(card.base) != card.base_digest:
        yield Problem("base-differs", f"not trained on the {card.base[:100]} that is here", CARD)
    if architecture(model_config(card.base)).tensors != architecture(config).tensors:
        yield Problem("base-differs", f"its shapes are not those of {card.base[:100]}", "config.json")


def _weight_files(folder: Path) -> set[str]:
    if not (folder / INDEX).exists():
        return {"model.safetensors"}
    return {INDEX, *json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()}


def _keys(value: Any) -> Iterator[str]:
    """Keys at any depth."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)
