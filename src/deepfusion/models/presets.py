"""Model types by name: presets, folders and models of the hub, and the public checkpoint behind each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, PretrainedConfig

from deepfusion.digests import checkpoint_digest, folder_digest, hub_revision, sha256_file
from deepfusion.errors import InputError
from deepfusion.folders import local_path
from deepfusion.models import cache, deepen, formats, smollm2
from deepfusion.models.architecture import Architecture, architecture, parameter_total, read_config
from deepfusion.tiny import FOLDER as TINY

METHODS = ("full", "lora", "qlora")  # from the most to the least memory for one type
LORA_TARGETS = "all-linear"  # PEFT: every linear layer but the output layer


@dataclass(frozen=True)
class Preset:
    """A named public checkpoint.

    Attributes:
        hub: its name on the hub; None where it has none and comes with the package, or is made here.
        model_type, dimensions: what is on the hub, so that memory can be planned without a network.
        make: its folder where it is neither on the hub nor comes with the package, or for who has no network: made
            once and kept in the user's cache.
        can_make: whether `make` can do without a network what it does.
        licence: of the weights.
    """

    hub: str | None = None
    model_type: str = ""
    dimensions: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Path] | None = None
    can_make: Callable[[], bool] = lambda: True
    licence: str = "Apache-2.0"


_SMOLLM2: dict[str, Any] = {
    **{"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    **{"max_position_embeddings": 8192, "rope_theta": 100000.0},
}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "small-llama": (
        "llama", {**_SMOLLM2, "num_hidden_layers": 18, "vocab_size": 49152, "tie_word_embeddings": True}
    ),
    "small-olmo": (
        "olmo", {**_SMOLLM2, "num_hidden_layers": 20, "vocab_size": 16384, "tie_word_embeddings": False,
        "eos_token_id": 0, "pad_token_id": 1}
    ),
}  # fmt: skip
"""Made of SmolLM2-135M by `deepfusion models make`: on-device models of real size, of other shapes and tokenizers."""


def _made_small(name: str) -> Path:
    if not _is_small_here(name):
        fix = f"deepfusion models make {name}"
        raise InputError(f"{name} is not made yet", where=cache.place(name), fix=fix, code="no-model")
    return cache.place(name)


def _is_small_here(name: str) -> bool:
    return (cache.place(name) / "config.json").is_file()


PRESETS: dict[str, Preset] = {
    "gpt2": Preset("openai-community/gpt2", "gpt2", licence="MIT"),
    "gpt2-medium": Preset(
        "openai-community/gpt2-medium",
        "gpt2",
        {"n_embd": 1024, "n_layer": 24, "n_head": 16},
        licence="MIT",
    ),
    "tinyllama": Preset(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "llama",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048},
    ),
    "olmo-1b": Preset(
        "allenai/OLMo-1B-hf",
        "olmo",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16}
        | {"vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": True},
    ),
    "bloom-1b1": Preset(
        "bigscience/bloom-1b1",
        "bloom",
        {"hidden_size": 1536, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
        licence="BigScience RAIL 1.0",
    ),
    "smollm2-135m": Preset(
        smollm2.HUB,
        "llama",
        {**_SMOLLM2, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True},
        smollm2.checkpoint,
        smollm2.is_here,
    ),
    **{
        name: Preset(None, *shape, partial(_made_small, name), partial(_is_small_here, name))
        for name, shape in SMALL.items()
    },
    **{file.parent.name: Preset() for file in sorted(TINY.glob("*/config.json"))},
    "tiny-gpt2-medium": Preset(make=partial(deepen.cached, TINY / "tiny-gpt2", "tiny-gpt2-medium")),
}


def resolve(type: str) -> str:
    """The local checkpoint folder of a model type, downloaded once if it is a hub name.

    Args:
        type: a preset, a hub name `owner/name`, or a local folder.

    Raises:
        InputError: no such folder or preset, or the hub cannot be reached.
    """
    preset = PRESETS.get(type)
    if preset is not None and (hub := hub_name(type)) is not None:
        return _download(type, hub)
    if preset is not None:
        folder = preset.make() if preset.make is not None else TINY / type
    else:
        folder = local_path(type)
        if is_hub_name(type):
            return _download(type, type)
    if not (folder / "config.json").is_file():
        formats.refuse_adapter(folder)
        raise InputError(
            f"{type} is no preset and no folder with a config.json",
            allowed=f"{', '.join(PRESETS)}, a hub name, or a local checkpoint folder",
            code="no-model",
        )
    return str(folder)


def is_hub_name(type: str) -> bool:
    """Whether a model type is to be looked for on the hub: OWNER/NAME, and no folder here."""
    return not local_path(type).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", type) is not None


@lru_cache
def _download(type: str, hub: str, weights: bool = True) -> str:
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model"] if weights else ["config.json"]
    try:
        return snapshot_download(hub, allow_patterns=wanted, ignore_patterns="*/*")
    except GatedRepoError:
        what, fix = (
            f"the hub gives {hub} only to those who have accepted its terms",
            "accept them there, and hf auth login",
        )
        raise InputError(what, where=type, fix=fix, code="no-model") from None
    except (RepositoryNotFoundError, HFValidationError):
        what, fix = (
            f"the hub has no model {hub}",
            "mend the name, or name a local folder that holds the checkpoint",
        )
        raise InputError(what, where=type, fix=fix, code="no-model") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        fix = "name a local folder that holds the checkpoint, or fetch it into the cache while there is a network"
        raise InputError(
            f"{hub} is not in the cache of the hub, and {why}", where=type, fix=fix, code="no-model"
        ) from None


def require_plain(folder: str | Path, named_whole: bool = False) -> Architecture:
    """Checks a checkpoint whose weights are read tensor by tensor (`formats.require_plain`).

    Args:
        named_whole: tensors must have the names of the whole model, also those of the trunk.

    Returns:
        Its architecture.
    """
    config = read_config(folder)
    known = architecture(config)
    prefix = "" if named_whole else known.prefix
    formats.require_plain(folder, config, known.tensors, {*known.tied, *known.buffers}, prefix, known.ignored)
    return known


@lru_cache
def base_digest(type: str) -> str:
    """Digest of the weights of a public checkpoint, 64 hex digits; devices of one type must start from equal ones."""
    return folder_digest(resolve(type))


def hub_name(type: str) -> str | None:
    """What a model type is called on the hub; None for one that is a folder here, comes with the package or can be
    made here and was not fetched before.
    """
    preset = PRESETS.get(type)
    if preset is None:
        return type if is_hub_name(type) else None
    made = preset.make is not None and preset.can_make() and not (preset.hub and is_cached(preset.hub))
    return None if made else preset.hub


def checkpoint_version(type: str, sha256: Callable[[Path], str] = sha256_file) -> str:
    """What tells one state of a public checkpoint from another: the digest of all files of a folder, of a model of the
    hub its revision in the cache; empty where neither is here.

    Args:
        sha256: of a file, as of `checkpoint_digest`.
    """
    if hub := hub_name(type):
        return hub_revision(hub, "model")
    return checkpoint_digest(resolve(type), sha256) if type in PRESETS or local_path(type).exists() else ""


def model_config(type: str) -> PretrainedConfig:
    """The architecture of a model type; presets need no network."""
    preset = PRESETS.get(type)
    if preset is not None and preset.model_type:
        return AutoConfig.for_model(preset.model_type, **preset.dimensions)
    return read_config(_download(type, type, weights=False) if is_hub_name(type) else resolve(type))


def described(name: str) -> dict[str, Any]:
    """A preset for people: `name`, `class`, `weights`, `layers`, `tokens`, `licence`, `source`, and whether it can be
    had without a network, `here`.
    """
    preset, hub = PRESETS[name], hub_name(name)
    config = model_config(name)
    if hub is not None:
        here = is_cached(hub)
        source = f"the hub, {hub}" + (
            "" if here else f"; or: {smollm2.INSTALL}" if hub == smollm2.HUB else ""
        )
    elif name in SMALL:
        here = preset.can_make()
        source = f"made here{'' if here else f': deepfusion models make {name}'}"
    elif preset.hub is not None:
        here, source = True, f"the package {smollm2.PACKAGE}, 4 bits a weight"
    else:
        here, source = True, "this package"
    return {
        "name": name, "class": architecture(config).name, "weights": parameter_total(config),
        "layers": config.num_hidden_layers, "tokens": config.vocab_size, "licence": preset.licence,
        "source": source, "here": here,
    }  # fmt: skip


def is_cached(hub: str) -> bool:
    """Whether the cache of the hub holds the config and safetensors weights of a model."""
    config = try_to_load_from_cache(hub, "config.json")
    return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))
