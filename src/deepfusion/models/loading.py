"""Load a model and its tokenizer, whoever made them, in the precision that suits the machine."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from deepfusion.errors import InputError
from deepfusion.models import formats
from deepfusion.models.architecture import first_line, last_token, read_config
from deepfusion.models.checkpoints import tokenizer_files
from deepfusion.models.presets import resolve

# Of these a plain mean over the domains is taken; of the last three over those that have questions with options.


BF16_WIDTH = 512  # of the hidden states


def load_model(path: str | Path, precision: str = "fp32", quantization: Any = None) -> PreTrainedModel:
    """A causal language model with its weights in `precision` (fp32, bf16 or auto), on the CPU, in evaluation mode.

    Args:
        path: anything that `resolve` takes.
        quantization: a `BitsAndBytesConfig` for QLoRA.

    Raises:
        InputError: missing or damaged files, pickled weights, weights that do not fit the config, that are
            quantised in a way that cannot be undone, or that are no finite numbers; a model that is no causal
            language model.
    """
    folder = resolve(str(path))
    config = read_config(folder)
    formats.check_form(folder, config)
    dtype = torch.bfloat16 if resolve_precision(precision, config) == "bf16" else torch.float32
    options = (
        {"quantization_config": quantization} if quantization is not None else formats.loading_options(config)
    )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        model, loading = loaded
        formats.check_loading(folder, loading)
        if quantization is None and formats.quantisation(config) is not None:
            model = formats.plain_model(model, dtype)
    except InputError:
        raise
    except (
        Exception
    ) as error:  # Weights and config come from others, and the classes fail in many ways on bad values.
        if isinstance(error, ImportError) and quantization is not None:
            raise
        raise InputError(
            f"the model cannot be loaded ({first_line(error)})", where=path, code="bad-model"
        ) from None
    formats.check_finite(model.named_parameters(), path)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a checkpoint; it always has a token to pad with.

    Raises:
        InputError: missing or damaged, without a fast implementation (character offsets are needed), or with
            tokens that the model has no embedding for.
    """
    folder = resolve(str(path))
    if not tokenizer_files(folder):
        fix = "save the tokenizer of the model there too"
        raise InputError("no tokenizer files", where=path, fix=fix, code="tokenizer-missing")
    rows: int | None = getattr(read_config(folder), "vocab_size", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if (
            rows is not None
            and last_token(tokenizer)[1] >= rows
            and (Path(folder) / "tokenizer.json").is_file()
        ):
            # Some classes add tokens of their own that the model has never seen; the file alone does not.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        what = f"the tokenizer cannot be loaded ({first_line(error)})"
        raise InputError(what, where=path, code="bad-tokenizer") from None
    if not tokenizer.is_fast:
        raise InputError(
            "not a fast tokenizer: it gives no character offsets", where=path, code="slow-tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token", where=path, code="bad-tokenizer")
    token, last = last_token(tokenizer)
    if rows is not None and last >= rows:
        raise InputError(
            f"token {last} ({token[:40]!r}) lies beyond the {rows} embeddings", where=path, code="tokenizer-too-large",
            fix="model.resize_token_embeddings(len(tokenizer)) and train it, or the tokenizer without what was added",
        )  # fmt: skip
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def compute_device() -> torch.device:
    """Where models compute: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, config: PretrainedConfig) -> str:
    """fp32 or bf16; `auto` takes bf16 where that is faster for a model of this config.

    On a CPU that is not so below `BF16_WIDTH`: the library compiles a bf16 product for each new shape of a batch,
    and the backward pass of bf16 attention over short texts is slow (benchmarks/precision.md).
    """
    if precision != "auto":
        return precision
    narrow = not torch.cuda.is_available() and getattr(config, "hidden_size", 0) < BF16_WIDTH
    return "fp32" if narrow else hardware_precision()


@lru_cache
def hardware_precision() -> str:
    """bf16 where the hardware multiplies it natively, elsewhere fp32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        flags = set()
    return "bf16" if flags & {"avx512_bf16", "amx_bf16"} else "fp32"


def context_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that a model can read at once; None where its architecture sets no limit."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min((limit for limit in limits if limit), default=None)
