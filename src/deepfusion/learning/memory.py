"""The memory that a training takes, counted without taking any, and what fits into a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D

from deepfusion.errors import InputError
from deepfusion.learning.losses import BLOCK_ELEMENTS
from deepfusion.models.architecture import _meta_model, architecture
from deepfusion.models.loading import resolve_precision
from deepfusion.models.presets import METHODS, PRESETS, SMALL, hub_name, is_cached, model_config

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
        stored = round(quantised * (0.5 + 4 / 64)) + (parameters - quantised) * (
            2 if precision == "bf16" else 4
        )
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


def plan_training(
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
        {"budget_bytes", "fits": [{"type", "method", "estimated_bytes", "available", "needs"}], "chosen"}: the
        largest type first, for one type the method that trains most. `needs` says what is missing here, empty
        where it is `available`.
        `chosen` is the first that is available, else the first, None where nothing fits.
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
                entry = {
                    "type": type,
                    "method": method,
                    "estimated_bytes": needed,
                    "available": not lack,
                    "needs": lack,
                }
                found.append((-size, METHODS.index(method), entry))
    fits = [entry for *_, entry in sorted(found, key=lambda item: item[:2])]
    chosen = next((entry for entry in fits if entry["available"]), fits[0] if fits else None)
    return {"budget_bytes": budget_bytes, "fits": fits, "chosen": chosen}


def _lack(type: str, method: str) -> str:
    """What is missing on this machine before a type can be trained by a method; empty where nothing is."""
    lacks = []
    hub = hub_name(type)
    if hub is not None and not is_cached(hub):
        lacks.append(f"download of {hub}")
    if type in SMALL and not PRESETS[type].can_make():
        lacks.append(f"deepfusion models make {type}")
    if method == "qlora" and find_spec("bitsandbytes") is None:
        lacks.append("pip install deepfusion[qlora]")
    return ", ".join(lacks)


def _unit(prefix: str | None, binary: str | None) -> int:
    return (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()) if prefix else 0)


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


def _grouped_experts(
    module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every row of hidden [tokens, H] once for each of its experts, chosen and weights [tokens, top_k], as the class
    does it.
    """
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
    model.config.pad_token_id = (
        None  # with one, some classes look for padding in the values, and here there are none
    )
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(
            input_ids=torch.zeros(batch_size, tokens, dtype=torch.long, device="meta"), use_cache=False
        )
    return [storage.nbytes() for storage in kept.values()]
