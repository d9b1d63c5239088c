"""DeepSeek-MoE: v1, V2 and V3.

v1 has no class of its own in transformers. Qwen2Moe computes it when the gate of the shared expert is 0 (sigmoid 1/2)
and the shared down-projection is doubled; `export_deepseek_v1` undoes that. The gate has to stay 0 then.

DeepseekV2 never normalises the top-k softmax weights: `routed_scaling_factor` is K/k. Their sum cannot be constant for
a router that already prefers some experts, unless all are chosen (k = K). So with k < K its router starts *quiet*: rows
scaled so that logits are about 1e-6. It ranks the experts as the given router does, but weighs the chosen ones equally.
The cost: the first optimizer steps are larger than these rows, so a prototype start is soon forgotten, and the sum of
weights can grow to K/k as the router sharpens. Near-ties of a quiet router could mix slices of several bases, so with
m > 1 the slices of a base form a group (`group_limited_greedy`, k of K groups): whole FFNs, always, also after tuning.

DeepseekV3 has `norm_topk_prob`, scaling factor 1, one group, and a correction bias of 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config, PretrainedConfig, Qwen2MoeConfig

from deepfusion.errors import InputError
from deepfusion.families.base import Family, MoELayout, shared_mean
from deepfusion.families.qwen import Qwen2Moe
from deepfusion.folders import place_to_replace, whole_folder
from deepfusion.models.checkpoints import TensorReader, TensorWriter, copy_tokenizer

_QUIET_LOGIT = 1e-6  # below the 1e-5 of the contract, above the 6e-8 at which fp32 softmax scores near 1 tie


class Deepseek(Qwen2Moe):
    """DeepSeek-MoE v1, computed by the class of Qwen2-MoE without bias."""

    name = "deepseek"
    config_class = Qwen2MoeConfig
    bases = "llama without attention_bias and mlp_bias"
    tiny_base = "tiny-deepseek"
    leading_dense = True

    def fits(self, base: PretrainedConfig) -> bool:
        """As the protocol."""
        return base.model_type == "llama" and not base.attention_bias and not base.mlp_bias

    def owns(self, config: PretrainedConfig) -> bool:
        """As the protocol."""
        return not config.qkv_bias

    def pinned(self, name: str) -> bool:
        """As the protocol: v1 has no gate at its shared expert."""
        return name.endswith(".mlp.shared_expert_gate.weight")


class DeepseekV2(Family):
    """DeepSeek-V2."""

    name = "deepseek_v2"
    config_class = DeepseekV2Config
    architecture = "DeepseekV2ForCausalLM"
    bases = "deepseek_v2 with first_k_dense_replace >= num_hidden_layers and without mlp_bias"
    tiny_base = "tiny-deepseek-v2"
    leading_dense = True

    def fits(self, base: PretrainedConfig) -> bool:
        """As the protocol."""
        return base.model_type == "deepseek_v2" and _all_dense(base) and not base.mlp_bias

    def settings(self, base: PretrainedConfig, layout: MoELayout, width: int) -> dict[str, Any]:
        """As the protocol."""
        found = _settings(layout, width) | {
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "routed_scaling_factor": layout.experts / layout.top_k,
        }
        if layout.split > 1 and layout.top_k < layout.experts:
            groups = {"n_group": layout.experts, "topk_group": layout.top_k}
            found |= {"topk_method": "group_limited_greedy", **groups}
        return found

    def shared_tensors(
        self, layout: MoELayout, readers: Sequence[TensorReader], name: str, prefix: str, projection: str
    ) -> Iterator[tuple[str, Tensor]]:
        """As the protocol."""
        mean = shared_mean(layout, readers, name, projection, half=True)
        yield f"{prefix}shared_experts.{projection}.weight", mean

    def router_tensors(
        self, layout: MoELayout, prefix: str, rows: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """As the protocol, quiet."""
        largest = rows.norm(dim=1).max().item()
        if layout.top_k < layout.experts and largest > 0:
            # Normed hidden states are about sqrt(hidden) long, so a random row of length r gives logits of about r.
            rows = rows * (_QUIET_LOGIT / largest)
        yield from super().router_tensors(layout, prefix, rows, dtype)

    def pruned(self, config: PretrainedConfig, bases: int, kept: int) -> dict[str, Any]:
        """As the protocol: its weights are no shares, the mean one is 1 / routed times the factor."""
        routed = config.n_routed_experts
        size = routed // bases * kept
        before, now = config.num_experts_per_tok, min(config.num_experts_per_tok, size)
        found: dict[str, Any] = {
            "routed_scaling_factor": config.routed_scaling_factor * before / now * size / routed
        }
        if config.n_group not in (None, 1):
            if config.n_group != bases:
                raise InputError(
                    f"{config.n_group} groups of experts",
                    allowed=f"1, or one for each of {bases} bases",
                    where="start",
                    code="fedjets-family",
                )
            found |= {"n_group": kept, "topk_group": min(config.topk_group, kept)}
        return found


class DeepseekV3(DeepseekV2):
    """DeepSeek-V3."""

    name = "deepseek_v3"
    config_class = DeepseekV3Config  # type: ignore[assignment]
    architecture = "DeepseekV3ForCausalLM"
    bases = (
        "deepseek_v3, or deepseek_v2 without rope scaling, with first_k_dense_replace >= num_hidden_layers"
    )
    least_routed = 2
    scores = "sigmoid"

    def fits(self, base: PretrainedConfig) -> bool:
        """As the protocol: dense layers of both versions are the same; the two scale extended rope differently."""
        if base.model_type == "deepseek_v2":
            plain = base.rope_parameters.get("rope_type", "default") == "default"
            return super().fits(base) and plain
        return base.model_type == "deepseek_v3" and _all_dense(base)

    def settings(self, base: PretrainedConfig, layout: MoELayout, width: int) -> dict[str, Any]:
        """As the protocol; the merge keeps no multi-token-prediction layers."""
        return _settings(layout, width) | {"norm_topk_prob": True, "num_mtp_layers": 0}

    def router_tensors(
        self, layout: MoELayout, prefix: str, rows: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """As the protocol, with the correction bias."""
        yield from Family.router_tensors(self, layout, prefix, rows, dtype)
        yield f"{prefix}gate.e_score_correction_bias", torch.zeros(layout.routed, dtype=torch.float32)

    def pruned(self, config: PretrainedConfig, bases: int, kept: int) -> dict[str, Any]:
        """As the protocol."""
        if config.n_group not in (None, 1):
            raise InputError(
                f"{config.n_group} groups of experts", allowed="1", where="start", code="fedjets-family"
            )
        return {}


def _all_dense(config: PretrainedConfig) -> bool:
    return bool(config.first_k_dense_replace >= config.num_hidden_layers)


def _settings(layout: MoELayout, width: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": width,
        "n_routed_experts": layout.routed,
        "n_shared_experts": 0 if layout.shared == "none" else layout.split,
        "first_k_dense_replace": len(layout.dense_layers),
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    }


def export_deepseek_v1(moe_folder: Path | str, out: Path | str) -> None:
    """Rewrites a merged or tuned MoE of family `deepseek` in the native DeepSeek-MoE v1 layout, which vLLM loads.

    Raises:
        InputError: the checkpoint is of another family, or its shared experts' gates were trained; `out` is not empty.
    """
    moe_folder, out = Path(moe_folder), place_to_replace(Path(out), [Path(moe_folder)])
    if out.is_dir() and any(out.iterdir()):
        raise InputError("the folder is not empty", where=out, fix="choose another one", code="not-ours")
    config = AutoConfig.from_pretrained(moe_folder)
    head = config.hidden_size // config.num_attention_heads  # v1 knows no other size of a head
    if (
        type(config) is not DEEPSEEK.config_class
        or config.qkv_bias
        or (layers := list(config.mlp_only_layers or [])) != list(range(len(layers)))
        or getattr(config, "head_dim", head) != head
    ):
        raise InputError("not an MoE of family deepseek", where=moe_folder, code="export-family")
    if config.num_experts_per_tok == 1:
        raise InputError(
            "DeepSeek-MoE v1 does not normalise a single weight",
            where="top_k",
            allowed="2 or more",
            code="export-top-k",
        )
    with whole_folder(out) as part:
        with TensorReader(moe_folder) as reader, TensorWriter(part) as writer:
            for name in reader.names():
                tensor = reader.get(name)
                if name.endswith(".shared_expert_gate.weight"):
                    if tensor.any():
                        raise InputError(
                            "the shared expert's gate was trained",
                            where=name,
                            fix="keep it frozen",
                            code="export-gate",
                        )
                elif tensor.numel():
                    halve = name.endswith(".shared_expert.down_proj.weight")  # the gate's sigmoid(0) is gone
                    writer.add(
                        name.replace(".shared_expert.", ".shared_experts."), tensor * 0.5 if halve else tensor
                    )
        (part / "config.json").write_text(
            json.dumps(_deepseek_v1_config(config), indent=2, sort_keys=True) + "\n"
        )
        copy_tokenizer(moe_folder, part)


def _deepseek_v1_config(config: PretrainedConfig) -> dict[str, object]:
    same = (
        "bos_token_id eos_token_id pad_token_id hidden_act hidden_size initializer_range intermediate_size "
        "max_position_embeddings moe_intermediate_size norm_topk_prob num_attention_heads num_experts_per_tok "
        "num_hidden_layers num_key_value_heads rms_norm_eps tie_word_embeddings use_cache vocab_size attention_dropout"
    )
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    return {key: getattr(config, key) for key in same.split()} | {
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "attention_bias": False,
        "first_k_dense_replace": len(config.mlp_only_layers),
        "moe_layer_freq": 1,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.shared_expert_intermediate_size // config.moe_intermediate_size or None,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "scoring_func": "softmax",
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
    }


DEEPSEEK = Deepseek()
DEEPSEEK_V2 = DeepseekV2()
DEEPSEEK_V3 = DeepseekV3()
