"""What the config of a checkpoint says about its weights: class, shapes, names, without any memory for them."""

from __future__ import annotations

import copy
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from deepfusion.errors import InputError


def parameter_total(config: PretrainedConfig) -> int:
    """Number of weights of the model that `config` describes."""
    return sum(math.prod(shape) for shape in architecture(config).tensors.values())


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of a checkpoint folder, without what only the machine of its maker can do (flash attention, special
    kernels).

    Raises:
        InputError: missing, malformed, or of an architecture that transformers does not have.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # A config comes from others, and the classes fail in many ways on bad values.
        raise InputError(
            f"the config cannot be read ({first_line(error)})", where=folder, code="bad-config"
        ) from None
    config._attn_implementation, config._experts_implementation = None, None
    rows, padding = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if rows is not None and padding is not None and not 0 <= padding < rows:
        config.pad_token_id = None  # nothing here reads padding, but the classes refuse an id without a row
    return config


def stored_dtype(folder: str | Path) -> torch.dtype:
    """Uploads are as precise as the public checkpoint they came from: bf16 halves what crosses the network."""
    dtype = read_config(folder).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def last_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """The token of the highest id, added ones too; a model needs an embedding for each."""
    return max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))


# Type signatures: what makes the weights of two models averageable.


class Architecture(NamedTuple):
    """What a config says about the weights, without any memory for them.

    Attributes:
        name: the class.
        tensors: shape of every stored tensor, tied copies left out.
        tied: name of a tied copy -> name of the tensor that is stored.
        buffers: those of `tensors` that are not trained.
        transposed: weights stored as [in, out] (Conv1D of the GPT-2 family).
        prefix: of the trunk; hub checkpoints saved from the trunk alone leave it out.
        ignored: patterns of the names of stored tensors that the class leaves unread, such as layers for other uses.
    """

    name: str
    tensors: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    buffers: frozenset[str]
    transposed: frozenset[str]
    prefix: str
    ignored: frozenset[str]


def architecture(config: PretrainedConfig) -> Architecture:
    """The tensors of the causal language model that `config` describes.

    Raises:
        InputError: the config describes no causal language model.
    """
    model = _meta_model(config)
    kept = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in kept.items()}
    shared = {
        name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if name not in kept
    }
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in shared}
    return Architecture(
        type(model).__name__,
        state,
        shared,
        frozenset(state) - frozenset(kept),
        frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)),
        f"{model.base_model_prefix}.",
        frozenset(model._keys_to_ignore_on_load_unexpected or ()),
    )


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # A config comes from others, and the classes fail in many ways on bad values.
        what = f"the config describes no causal language model ({first_line(error)})"
        raise InputError(what, code="bad-config") from None


def first_line(error: BaseException) -> str:
    """What a library's error says first, or its kind."""
    return textwrap.shorten(
        (str(error).strip() or type(error).__name__).splitlines()[0], 300, placeholder=" ..."
    )
