"""Model types by name: presets, folders and models of the hub, and the public checkpoint behind each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
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
from deepfusion.models import deepen, formats
from deepfusion.models.architecture import Architecture, architecture, read_config
from deepfusion.tiny import FOLDER as TINY

METHODS = ("full", "lora", "qlora")  # from the most to the least memory for one type
LORA_TARGETS = "all-linear"  # PEFT: every linear layer but the output layer


@dataclass(frozen=True)
class Preset:
    """A named on-device model: its hub name, and its dimensions so that memory can be planned without a network.

    Without a hub name it comes with the package, as files or (`deepened`) made of those of another.
    """

    hub: str | None = None
    model_type: str = ""
    dimensions: dict[str, Any] = field(default_factory=dict)
    deepened: str | None = None


PRESETS: dict[str, Preset] = {
    "gpt2": Preset("openai-community/gpt2", "gpt2"),
    "gpt2-medium": Preset(
        "openai-community/gpt2-medium", "gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}
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
    ),
    **{file.parent.name: Preset() for file in sorted(TINY.glob("*/config.json"))},
    "tiny-gpt2-medium": Preset(deepened="tiny-gpt2"),
}


def resolve(type: str) -> str:
    """The local checkpoint folder of a model type, downloaded once if it is a hub name.

    Args:
        type: a preset, a hub name `owner/name`, or a local folder.

    Raises:
        InputError: no such folder or preset, or the hub cannot be reached.
    """
    preset = PRESETS.get(type)
    if preset is not None and preset.deepened is not None:
        folder = deepen.cached(TINY / preset.deepened, type)
    elif preset is not None and preset.hub is None:
        folder = TINY / type
    elif preset is not None:
        return _download(type, preset.hub or type)
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
    """What a model type is called on the hub; None for one that is a folder here or comes with the package."""
    preset = PRESETS.get(type)
    return preset.hub if preset else type if is_hub_name(type) else None


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
    if preset is not None and preset.hub is not None:
        return AutoConfig.for_model(preset.model_type, **preset.dimensions)
    return read_config(_download(type, type, weights=False) if is_hub_name(type) else resolve(type))


def is_cached(hub: str) -> bool:
    """Whether the cache of the hub holds the config and safetensors weights of a model."""
    config = try_to_load_from_cache(hub, "config.json")
    return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))
