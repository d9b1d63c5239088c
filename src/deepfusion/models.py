"""On-device model types: presets, loading, what makes two models averageable, and the memory that training takes."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D

from deepfusion import deepen, formats
from deepfusion.checkpoints import tokenizer_files
from deepfusion.digests import checkpoint_digest, folder_digest
from deepfusion.errors import InputError
from deepfusion.folders import local_path
from deepfusion.losses import BLOCK_ELEMENTS
from deepfusion.tiny import FOLDER as TINY

METHODS = ("full", "lora", "qlora")  # from the most to the least memory for one type
LORA_TARGETS = "all-linear"  # PEFT: every linear layer but the output layer
BF16_WIDTH = 512  # of the hidden states


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
    "gpt2-medium": Preset("openai-community/gpt2-medium", "gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
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
    "bloom-1b1": Preset("bigscience/bloom-1b1", "bloom", {"hidden_size": 1536, "n_layer": 24, "n_head": 16, "vocab_size": 250880}),
    **{
        name: Preset()
        for name in (
            *("tiny-gpt2", "tiny-llama", "tiny-olmo", "tiny-bloom"),
            *("tiny-qwen2", "tiny-qwen3", "tiny-deepseek", "tiny-deepseek-v2"),
        )
    },
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
        what, fix = f"the hub gives {hub} only to those who have accepted its terms", "accept them there, and hf auth login"
        raise InputError(what, where=type, fix=fix, code="no-model") from None
    except (RepositoryNotFoundError, HFValidationError):
        what, fix = f"the hub has no model {hub}", "mend the name, or name a local folder that holds the checkpoint"
        raise InputError(what, where=type, fix=fix, code="no-model") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        fix = "name a local folder that holds the checkpoint, or fetch it into the cache while there is a network"
        raise InputError(f"{hub} is not in the cache of the hub, and {why}", where=type, fix=fix, code="no-model") from None


_TINY_BASES = {
    "qwen2_moe": "tiny-qwen2",
    "qwen3_moe": "tiny-qwen3",
    "deepseek": "tiny-deepseek",
    "deepseek_v2": "tiny-deepseek-v2",
    "deepseek_v3": "tiny-deepseek-v2",
}


def base_checkpoint(base: str | None, family: str) -> Path:
    """Folder of the public dense base that distillation starts from; None takes the tiny base of the family.

    Raises:
        InputError: there is none, or it is not stored as plain weights of its class.
    """
    folder = Path(resolve(base or _TINY_BASES[family]))
    require_plain(folder, named_whole=True)
    return folder


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


def parameter_total(config: PretrainedConfig) -> int:
    """Number of weights of the model that `config` describes."""
    return sum(math.prod(shape) for shape in architecture(config).tensors.values())


@lru_cache
def base_digest(type: str) -> str:
    """Digest of the weights of a public checkpoint, 64 hex digits; devices of one type must start from equal ones."""
    return folder_digest(resolve(type))


def local_digest(type: str) -> str:
    """Digest of all files of a public checkpoint that is a folder here or comes with the package; empty for one of the hub.

    Raises:
        InputError: no such folder or preset.
    """
    preset = PRESETS.get(type)
    here = preset.hub is None if preset else local_path(type).exists()
    return checkpoint_digest(resolve(type)) if here else ""


def model_config(type: str) -> PretrainedConfig:
    """The architecture of a model type; presets need no network."""
    preset = PRESETS.get(type)
    if preset is not None and preset.hub is not None:
        return AutoConfig.for_model(preset.model_type, **preset.dimensions)
    return read_config(_download(type, type, weights=False) if is_hub_name(type) else resolve(type))


def read_config(folder: str | Path) -> PretrainedConfig:
    """The config of a checkpoint folder, without what only the machine of its maker can do (flash attention, special kernels).

    Raises:
        InputError: missing, malformed, or of an architecture that transformers does not have.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # A config comes from others, and the classes fail in many ways on bad values.
        raise InputError(f"the config cannot be read ({first_line(error)})", where=folder, code="bad-config") from None
    config._attn_implementation, config._experts_implementation = None, None
    rows, padding = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if rows is not None and padding is not None and not 0 <= padding < rows:
        config.pad_token_id = None  # nothing here reads padding, but the classes refuse an id without a row
    return config


def stored_dtype(folder: str | Path) -> torch.dtype:
    """Uploads are as precise as the public checkpoint they came from: bf16 halves what crosses the network."""
    dtype = read_config(folder).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_model(path: str | Path, precision: str = "fp32", quantization: Any = None) -> PreTrainedModel:
    """A causal language model with its weights in `precision` (fp32, bf16 or auto), on the CPU, in evaluation mode.

    Args:
        path: anything that `resolve` takes.
        quantization: a `BitsAndBytesConfig` for QLoRA.

    Raises:
        InputError: missing or damaged files, pickled weights, weights that do not fit the config, that are quantised in a way
            that cannot be undone, or that are no finite numbers; a model that is no causal language model.
    """
    folder = resolve(str(path))
    config = read_config(folder)
    formats.check_form(folder, config)
    dtype = torch.bfloat16 if resolve_precision(precision, config) == "bf16" else torch.float32
    options = {"quantization_config": quantization} if quantization is not None else formats.loading_options(config)
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
    except Exception as error:  # Weights and config come from others, and the classes fail in many ways on bad values.
        if isinstance(error, ImportError) and quantization is not None:
            raise
        raise InputError(f"the model cannot be loaded ({first_line(error)})", where=path, code="bad-model") from None
    formats.check_finite(model.named_parameters(), path)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a checkpoint; it always has a token to pad with.

    Raises:
        InputError: missing or damaged, without a fast implementation (character offsets are needed), or with tokens that the
            model has no embedding for.
    """
    folder = resolve(str(path))
    if not tokenizer_files(folder):
        fix = "save the tokenizer of the model there too"
        raise InputError("no tokenizer files", where=path, fix=fix, code="tokenizer-missing")
    rows: int | None = getattr(read_config(folder), "vocab_size", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if rows is not None and last_token(tokenizer)[1] >= rows and (Path(folder) / "tokenizer.json").is_file():
            # Some classes add tokens of their own that the model has never seen; the file alone does not.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        what = f"the tokenizer cannot be loaded ({first_line(error)})"
        raise InputError(what, where=path, code="bad-tokenizer") from None
    if not tokenizer.is_fast:
        raise InputError("not a fast tokenizer: it gives no character offsets", where=path, code="slow-tokenizer")
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


def last_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """The token of the highest id, added ones too; a model needs an embedding for each."""
    return max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))


def resolve_precision(precision: str, config: PretrainedConfig) -> str:
    """fp32 or bf16; `auto` takes bf16 where that is faster for a model of this config.

    On a CPU that is not so below `BF16_WIDTH`: the library compiles a bf16 product for each new shape of a batch, and the
    backward pass of bf16 attention over short texts is slow (benchmarks/precision.md).
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
    shared = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if name not in kept}
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


# Keys of a config that do not change what the weights mean.
_BOOKKEEPING = re.compile(
    r"(transformers_version|_name_or_path|architectures|dtype|torch_dtype|use_cache|task_specific_params|\w*_token_id"
    r"|\w*(dropout|pdrop)\w*|initializer_range|return_dict|output_\w+|pretraining_tp|slow_but_exact|_attn_implementation\w*)"
)


def type_signature(folder: str | Path, base: str = "") -> str:
    """Digest of class, shapes, architecture settings, tokenizer and base checkpoint, 64 hex digits.

    Only models of equal signatures are averaged. Weights that started from different checkpoints lie in different
    basins, and the same shapes with another number of heads or another vocabulary mean something else.

    Args:
        folder: holds `config.json` and `tokenizer.json`.
        base: digest of the weights that training started from, empty where unknown.
    """
    config = read_config(folder)
    layout = architecture(config)
    settings = {key: value for key, value in config.to_dict().items() if not _BOOKKEEPING.fullmatch(key)}
    parts = [layout.name, sorted(layout.tensors.items()), settings, tokenizer_digest(folder), base]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(folder: str | Path) -> str:
    """Digest of what a tokenizer does to text, 64 hex digits; how `tokenizer.json` is laid out does not matter."""
    path = Path(folder) / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"not a readable tokenizer ({first_line(error)})", where=path, code="bad-tokenizer") from None
    backend.no_padding()
    backend.no_truncation()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


# Memory of a training on a device.

RUNTIME_BYTES = 600 * 10**6
"""Resident memory of a device process with all that it imports, after one step of a minuscule model (measured)."""
HEAP_LIMIT = 32 * 2**20
"""Larger allocations are mapped and given back one by one; smaller ones come from the C library's heap (glibc)."""
FRAGMENTATION = 1.6
"""What the heap takes for each byte asked of it when batches differ in size (measured, 1.3 to 2)."""


def estimate_training_bytes(
    config: PretrainedConfig,
    method: str = "full",
    batch_size: int = 8,
    max_tokens: int = 512,
    precision: str = "fp32",
    lora_rank: int = 16,
) -> int:
    """Peak bytes of the whole process while it trains this model.

    Counted on the meta device, so no memory is taken: weights (fp32; a frozen base in `precision`, qlora in 4 bits),
    fp32 gradients and the two AdamW moments of what is trained, every tensor that autograd really keeps for the
    backward pass, blocks of logits, the largest temporary of AdamW, and the runtime itself.

    Args:
        method: full, lora or qlora.
        batch_size, max_tokens: the largest batch, in documents and in tokens a document.
        precision: of the computation, fp32, bf16 or auto.
        lora_rank: rank of the LoRA matrices.
    """
    precision = resolve_precision(precision, config)
    model = _meta_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    linear = _linear_sizes(model)
    if method == "full":
        trained, stored = parameters, 0
        largest = max(p.numel() for p in model.parameters())
    else:
        trained = sum(lora_rank * (rows + columns) for rows, columns in linear)
        quantised = sum(rows * columns for rows, columns in linear) if method == "qlora" else 0
        # NF4: half a byte a weight and a 32-bit scale for every 64 of them.
        stored = round(quantised * (0.5 + 4 / 64)) + (parameters - quantised) * (2 if precision == "bf16" else 4)
        largest = max((rows * columns for rows, columns in linear), default=0) if method == "qlora" else 0
    kept = _saved_tensors(model, batch_size, max_tokens)
    if precision == "bf16":
        kept = [size // 2 for size in kept]
    if method != "full":
        kept += [4 * batch_size * max_tokens * lora_rank for _ in linear]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    logits = [4 * min(batch_size * max_tokens * vocabulary, BLOCK_ELEMENTS)] * 3
    activations = sum(size * (FRAGMENTATION if size <= HEAP_LIMIT else 1) for size in kept + logits)
    return round(RUNTIME_BYTES + 16 * trained + stored + 8 * largest + activations)


def require_memory(needed: int, what: str, *, where: str, fix: str, allowed: str | None = None) -> None:
    """Refuses work that does not fit into the memory that is free, on the GPU where there is one.

    Raises:
        InputError: `what` needs more bytes than are free (`too-little-memory`).
    """
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        what = f"{what} takes about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        raise InputError(what, where=where, allowed=allowed, fix=fix, code="too-little-memory")


def parse_memory(memory: str | int) -> int:
    """Bytes in "4GB", "512MiB", "1.5 GiB" or a plain number of bytes.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", str(memory), re.IGNORECASE)
    if match is None or (size := float(match[1]) * _unit(match[2], match[3])) < 1:
        allowed = "4GB, 512MiB or a number of bytes"
        raise InputError(f"{memory!r} is no amount of memory", allowed=allowed, code="bad-memory")
    return int(size)


def plan(
    budget_bytes: int,
    types: Iterable[str],
    methods: Iterable[str] = METHODS,
    batch_size: int = 8,
    text: int | None = None,
    precision: str = "fp32",
    lora_rank: int = 16,
) -> dict[str, Any]:
    """Which model types and methods fit into a memory budget.

    Args:
        budget_bytes: of the whole process.
        text: length of the longest document in characters, default 1024; a token is taken to hold three of them.

    Returns:
        {"budget_bytes", "fits": [{"type", "method", "estimated_bytes", "available", "needs"}], "chosen"}: the largest type first,
        for one type the method that trains most. `needs` says what is missing here, empty where it is `available`. `chosen` is
        the first that is available, else the first, None where nothing fits.
    """
    tokens = math.ceil((text or 1024) / 3)
    found = []
    for type in types:
        config = model_config(type)
        size = sum(math.prod(shape) for shape in architecture(config).tensors.values())
        longest = min(tokens, getattr(config, "max_position_embeddings", tokens))
        for method in methods:
            needed = estimate_training_bytes(config, method, batch_size, longest, precision, lora_rank)
            if needed <= budget_bytes:
                lack = _lack(type, method)
                entry = {"type": type, "method": method, "estimated_bytes": needed, "available": not lack, "needs": lack}
                found.append((-size, METHODS.index(method), entry))
    fits = [entry for *_, entry in sorted(found, key=lambda item: item[:2])]
    chosen = next((entry for entry in fits if entry["available"]), fits[0] if fits else None)
    return {"budget_bytes": budget_bytes, "fits": fits, "chosen": chosen}


def _lack(type: str, method: str) -> str:
    """What is missing on this machine before a type can be trained by a method; empty where nothing is."""
    lacks = []
    preset = PRESETS.get(type)
    hub = preset.hub if preset is not None else type if is_hub_name(type) else None
    if hub is not None and not is_cached(hub):
        lacks.append(f"download of {hub}")
    if method == "qlora" and find_spec("bitsandbytes") is None:
        lacks.append("pip install deepfusion[qlora]")
    return ", ".join(lacks)


def is_cached(hub: str) -> bool:
    """Whether the cache of the hub holds the config and safetensors weights of a model."""
    config = try_to_load_from_cache(hub, "config.json")
    return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))


def _unit(prefix: str | None, binary: str | None) -> int:
    return (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0)


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # A config comes from others, and the classes fail in many ways on bad values.
        what = f"the config describes no causal language model ({first_line(error)})"
        raise InputError(what, code="bad-config") from None


def _linear_sizes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """[out, in] of every layer that LoRA adapts: all linear ones but the output layer, and each expert's own."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    convolutions = [module for module in model.modules() if isinstance(module, Conv1D)]
    experts = [weight for weight in _fused_experts(model) for _ in weight]
    return (
        [(m.out_features, m.in_features) for m in linear]
        + [(m.nf, m.nx) for m in convolutions]
        + [(weight.shape[1], weight.shape[2]) for weight in experts]
    )


def _fused_experts(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights [experts, out, in] of a Mixture-of-Experts, which hold all routed experts of a layer."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 3]


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs and its output, never the [T, T] scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out)
        return out


def _fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


class _GroupedProduct(torch.autograd.Function):
    """Keeps what a grouped matrix product keeps: the rows that go in, and the weights, which are there anyhow."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty((len(rows), weight.shape[1]))


def _grouped_experts(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every row of hidden [tokens, H] once for each of its experts, chosen and weights [tokens, top_k], as the class does it."""
    order = chosen.flatten()  # on the meta device any order keeps the same bytes
    inner = module._apply_gate(_GroupedProduct.apply(hidden[order], module.gate_up_proj))
    out = _GroupedProduct.apply(inner, module.down_proj) * weights.flatten()[order, None]
    return out[order].view(*chosen.shape, -1).sum(1)


AttentionInterface.register("deepfusion_meta", _fused_attention)
ExpertsInterface.register("deepfusion_meta", _grouped_experts)


def _saved_tensors(model: PreTrainedModel, batch_size: int, tokens: int) -> list[int]:
    """Bytes of each tensor that autograd keeps between the forward and the backward pass of the trunk."""
    own = {id(p.untyped_storage()) for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    if not any(module._get_name().startswith("Bloom") for module in model.modules()):
        model.set_attn_implementation("deepfusion_meta")
    if _fused_experts(model):
        model.set_experts_implementation("deepfusion_meta")
    model.config.pad_token_id = None  # with one, some classes look for padding in the values, and here there are none
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(batch_size, tokens, dtype=torch.long, device="meta"), use_cache=False)
    return [storage.nbytes() for storage in kept.values()]


def first_line(error: BaseException) -> str:
    """What a library's error says first, or its kind."""
    return textwrap.shorten((str(error).strip() or type(error).__name__).splitlines()[0], 300, placeholder=" ...")
