"""Qwen-MoE: `norm_topk_prob` makes the weights of the chosen experts add up to 1.

In bf16 these classes also compute router logits in bf16, where two bases can tie; with m > 1 a tie can mix slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from deepfusion.families.base import Family, MoELayout, shared_mean
from deepfusion.models.checkpoints import TensorReader


class Qwen3Moe(Family):
    """Qwen3-MoE, without shared experts."""

    name = "qwen3_moe"
    config_class = Qwen3MoeConfig
    architecture = "Qwen3MoeForCausalLM"
    bases = "qwen3 without sliding window, or qwen3_moe with all layers dense"
    tiny_base = "tiny-qwen3"
    shared_experts = False

    def fits(self, base: PretrainedConfig) -> bool:
        """As the protocol."""
        return (base.model_type == "qwen3" and not base.use_sliding_window) or is_dense(base, self.name)

    def settings(self, base: PretrainedConfig, layout: MoELayout, width: int) -> dict[str, Any]:
        """As the protocol."""
        return qwen_settings(layout, width)


class Qwen2Moe(Family):
    """Qwen2-MoE: a shared expert whose gate of 0 halves it, for sigmoid(0) = 1/2."""

    name = "qwen2_moe"
    config_class = Qwen2MoeConfig
    architecture = "Qwen2MoeForCausalLM"
    bases = "qwen2, or qwen2_moe with all layers dense"
    tiny_base = "tiny-qwen2"

    def fits(self, base: PretrainedConfig) -> bool:
        """As the protocol."""
        return base.model_type == "qwen2" or is_dense(base, self.name)

    def owns(self, config: PretrainedConfig) -> bool:
        """As the protocol: DeepSeek-MoE v1 shares the class."""
        return bool(config.qkv_bias)

    def settings(self, base: PretrainedConfig, layout: MoELayout, width: int) -> dict[str, Any]:
        """As the protocol."""
        return qwen_settings(layout, width) | {
            "shared_expert_intermediate_size": 0 if layout.shared == "none" else base.intermediate_size,
            "qkv_bias": base.model_type == "qwen2" or getattr(base, "qkv_bias", False),
        }

    def shared_tensors(
        self, layout: MoELayout, readers: Sequence[TensorReader], name: str, prefix: str, projection: str
    ) -> Iterator[tuple[str, Tensor]]:
        """As the protocol."""
        mean = shared_mean(layout, readers, name, projection, half=False)
        yield f"{prefix}shared_expert.{projection}.weight", mean

    def router_tensors(
        self, layout: MoELayout, prefix: str, rows: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """As the protocol, and the gate of the shared expert."""
        yield from super().router_tensors(layout, prefix, rows, dtype)
        yield f"{prefix}shared_expert_gate.weight", torch.zeros(1, rows.shape[1], dtype=dtype)


def qwen_settings(layout: MoELayout, width: int) -> dict[str, Any]:
    """What the configs of both classes say."""
    return {
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": layout.routed,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(layout.dense_layers),
    }


def is_dense(config: PretrainedConfig, model_type: str) -> bool:
    """Whether a model of an MoE class has no layer with experts."""
    return config.model_type == model_type and all(
        layer in config.mlp_only_layers or config.num_experts == 0 or (layer + 1) % config.decoder_sparse_step
        for layer in range(config.num_hidden_layers)
    )


QWEN2_MOE = Qwen2Moe()
QWEN3_MOE = Qwen3Moe()
