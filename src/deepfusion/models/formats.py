"""What a checkpoint folder says about its own form: what we read right is read, all else is refused by name.

A loader that skips what it does not know gives a model of wrong numbers: scales of quantised weights, the head of
a classifier, a shard that the index forgets, an adapter beside the weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepfusion.errors import InputError
from deepfusion.models.checkpoints import ADAPTER_CONFIG, TensorReader

DEQUANTISED = ("fp8", "bitsandbytes")
"""Kinds of quantised weights that are turned back into numbers here, also on a CPU."""

_SAVE_PLAIN = "load it where it runs, model.dequantize(), and save that"
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What older versions of transformers stored although it follows from the config: causal masks and rotary frequencies.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(attention\.)?(masked_)?bias)")
_SCALES = re.compile(
    r".*(scale|scale_inv|scales|SCB|absmax|quant_map|quant_state\.\w+|qweight|qzeros|g_idx|weight_format)"
)


def quantisation(config: PretrainedConfig) -> str | None:
    """How the weights of a checkpoint are quantised, such as fp8, bitsandbytes or gptq; None if they are plain
    numbers.
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    if isinstance(found, str):
        return found
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_8bit") or values.get("load_in_4bit"):
        return "bitsandbytes"
    return str(values.get("quant_method") or "an unnamed method")


def check_form(folder: Path | str, config: PretrainedConfig) -> None:
    """Refuses a checkpoint that would not be read as what it is, by its config and the headers of its weights.

    Raises:
        InputError: an adapter, a model with another head than that of a language model, weights quantised in a way
            that cannot be undone here, shards and index that do not belong together, or numbers that are none
            without scales.
    """
    folder = Path(folder)
    refuse_adapter(folder)
    known, named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ""), config.architectures or []
    if named and known not in named:
        raise InputError(
            f"a checkpoint of {', '.join(map(str, named))[:200]}, not of a causal language model", where=folder,
            allowed=known or None, code="not-a-language-model",
        )  # fmt: skip
    method = quantisation(config)
    if method not in (None, *DEQUANTISED):
        what = f"its weights are quantised ({method[:60]}), which cannot be undone here"
        raise InputError(
            what,
            where=folder,
            allowed=f"plain, or {', '.join(DEQUANTISED)}",
            fix=_SAVE_PLAIN,
            code="quantised",
        )
    with TensorReader(folder) as reader:
        odd = [] if method else [name for name in reader.names() if not _is_plain(reader, name)]
        if odd:
            dtype = str(reader.dtype(odd[0])).removeprefix("torch.")
            what = f"{odd[0]} is {dtype} ({len(odd)} such), and the config does not say how to read it"
            raise InputError(
                what, where=folder, allowed="float32, bfloat16, float16", fix=_SAVE_PLAIN, code="quantised"
            )


def refuse_adapter(folder: Path) -> None:
    """Raises:
    InputError: the folder holds an adapter, whether or not beside a whole model.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        whole = any(folder.glob("model*.safetensors"))
        what, fix = (
            "an adapter, not a whole model",
            "deepfusion fuse takes it beside its base; or merge it with PEFT and save that",
        )
        if whole:
            what, fix = "an adapter beside a whole model: which one is meant?", "move one of both away"
        raise InputError(what, where=folder, fix=fix, code="adapter-alone")


def require_plain(
    folder: Path | str, config: PretrainedConfig, tensors: Mapping[str, tuple[int, ...]],
    optional: Collection[str], prefix: str,
    ignored: Collection[str],
) -> None:  # fmt: skip
    """For weights that are read tensor by tensor: as `check_form`, and nothing is quantised, unknown, missing or of
    another shape.

    Args:
        tensors: shape of each tensor of the whole model.
        optional: names of what may or may not stand there, tied copies and buffers.
        prefix: of the trunk, where the checkpoint may leave it out, else empty.
        ignored: patterns of the names of what the class leaves unread.

    Raises:
        InputError: as `check_form`, and where it is not all that.
    """
    check_form(folder, config)
    if method := quantisation(config):
        what = f"its weights are quantised ({method}), and this place needs plain ones"
        raise InputError(what, where=folder, fix=_SAVE_PLAIN, code="quantised")
    with TensorReader(folder) as reader:
        known, names = {*tensors, *optional}, reader.names()
        unknown = [
            n
            for n in names
            if n not in known and prefix + n not in known and not is_derived(n, reader.shape(n))
        ]
        unknown = [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]
        stored = {name if name in known else prefix + name: reader.shape(name) for name in names}
    missing = set(tensors) - set(optional) - set(stored)
    odd = [
        (name, stored[name], shape)
        for name, shape in tensors.items()
        if name in stored and stored[name] != shape
    ]
    _refuse(folder, unknown, missing, odd)


def is_derived(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor follows from the config, as older versions of transformers wrote them: no weight is
    lost with it.
    """
    return _DERIVED.fullmatch(name) is not None and (not name.endswith("bias") or len(shape) in (0, 4))


def _refuse(
    folder: Path | str,
    unknown: Iterable[str],
    missing: Iterable[str],
    odd: Iterable[tuple[str, Iterable[int], Iterable[int]]],
) -> None:
    if unknown := sorted(unknown):
        if scales := [name for name in unknown if _SCALES.fullmatch(name)]:
            what = (
                f"{len(scales)} scales of quantised weights, such as {scales[0]}, and the config "
                "does not say how to read them"
            )
            raise InputError(what, where=folder, fix=_SAVE_PLAIN, code="quantised")
        what = f"{len(unknown)} tensors that such a model does not have, such as {unknown[0]}"
        raise InputError(
            what, where=folder, fix="save the model again with save_pretrained", code="bad-model"
        )
    if missing := sorted(missing):
        raise InputError(
            f"{len(missing)} tensors are missing, such as {missing[0]}", where=folder, code="bad-model"
        )
    if odd := sorted(odd):
        name, stored, wanted = odd[0]
        what = (
            f"{len(odd)} tensors are not of the shape that the config says, such as {name}: "
            f"{list(stored)}, not {list(wanted)}"
        )
        raise InputError(what, where=folder, code="bad-model")


def check_loading(folder: Path | str, loading: dict[str, Any]) -> None:
    """Refuses a model that was not loaded whole, by what `from_pretrained` tells of it (`output_loading_info`).

    Raises:
        InputError: tensors are missing, of another shape, or unknown.
    """
    with TensorReader(folder) as reader:
        derived = [name for name in reader.names() if is_derived(name, reader.shape(name))]
    # Where the checkpoint leaves the trunk's prefix out, the loader tells of names that have it.
    unknown = [
        name
        for name in loading["unexpected_keys"]
        if not any(f".{name}".endswith(f".{known}") for known in derived)
    ]
    _refuse(folder, unknown, loading["missing_keys"], loading["mismatched_keys"])


def loading_options(config: PretrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` must be told to turn quantised weights back into numbers."""
    return (
        {"quantization_config": FineGrainedFP8Config(dequantize=True)}
        if quantisation(config) == "fp8"
        else {}
    )


def plain_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all weights as numbers of `dtype`, and with no memory of how it came to be when it is saved.

    Args:
        model: as loaded from a quantised checkpoint, or with an adapter merged in.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    embeddings: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight
    if config.tie_word_embeddings and not torch.equal(embeddings, head):
        config.tie_word_embeddings = False  # an adapter has trained one of the two
    # A new one: the loaded model remembers how to quantise itself again when it is saved.
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    plain.load_state_dict(model.state_dict())
    plain.generation_config, plain.name_or_path = model.generation_config, model.name_or_path
    return plain.eval()


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: object) -> None:
    """Looks at every value of the named tensors.

    Raises:
        InputError: one is NaN or infinite.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.detach().aminmax()
            if not (low.isfinite() and high.isfinite()):
                fix = "another checkpoint; the training of this one has failed"
                raise InputError(
                    f"{name} holds NaN or infinite values", where=where, fix=fix, code="non-finite"
                )


def _is_plain(reader: TensorReader, name: str) -> bool:
    dtype = reader.dtype(name)
    return (
        dtype in _PLAIN_DTYPES
        or is_derived(name, reader.shape(name))
        or dtype in (torch.bool, torch.int64, torch.int32)
    )
