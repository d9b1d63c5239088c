"""Mixtral: the router always normalises the weights of the chosen experts; there is no shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, PretrainedConfig

from deepfusion.families.base import Family, MoELayout

_PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class Mixtral(Family):
    """Mixtral, of Mistral bases, or of Llama bases without biases."""

    name = "mixtral"
    config_class = MixtralConfig
    architecture = "MixtralForCausalLM"
    bases = "mistral, or llama without attention_bias and mlp_bias"
    tiny_base = "tiny-deepseek"  # a dense llama
    shared_experts = False
    leading_dense = False

    def fits(self, base: PretrainedConfig) -> bool:
        """As the protocol."""
        if base.model_type == "llama":
            return not base.attention_bias and not base.mlp_bias
        return base.model_type == "mistral"

    def settings(self, base: PretrainedConfig, layout: MoELayout, width: int) -> dict[str, Any]:
        """As the protocol."""
        return {"num_local_experts": layout.routed, "intermediate_size": width, "router_jitter_noise": 0.0}

    def expert_tensor(self, prefix: str, expert: int, projection: str) -> str:
        """As the protocol."""
        block = prefix.replace(".mlp.", ".block_sparse_moe.")
        return f"{block}experts.{expert}.{_PROJECTIONS[projection]}.weight"

    def router_tensors(
        self, layout: MoELayout, prefix: str, rows: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """As the protocol."""
        yield from super().router_tensors(layout, prefix.replace(".mlp.", ".block_sparse_moe."), rows, dtype)


MIXTRAL = Mixtral()
