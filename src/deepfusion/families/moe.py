"""Target MoE families: how K dense bases become one Mixture-of-Experts checkpoint that computes the same function.

Every layout is *function preserving*: K identical bases give the base's own logits. With m = `split`, an FFN is cut
into m slices of its inner dimension, each a routed expert with its down-projection times m; the slices of a base share
one router row, so top-(m*k) picks whole FFNs and their normalised weights add up to 1:

| family | class | what makes the routed weights add up to 1 |
|---|---|---|
| qwen2_moe, qwen3_moe | Qwen2Moe, Qwen3Moe | `norm_topk_prob` |
| deepseek | Qwen2Moe without qkv bias | `norm_topk_prob` |
| deepseek_v2 | DeepseekV2 | `routed_scaling_factor = K/k` and a quiet router (see below) |
| deepseek_v3 | DeepseekV3 | `norm_topk_prob`, scaling factor 1, one group, correction bias 0 |

DeepSeek-MoE v1 has no class of its own in transformers. Qwen2Moe computes it when the gate of the shared expert is 0
(sigmoid 1/2) and the shared down-projection is doubled; `export_deepseek_v1` undoes that. The gate has to stay 0 then:
`pinned_parameters` names what a tuner must not touch.

DeepseekV2 never normalises the top-k softmax weights. Their sum cannot be constant for a router that already prefers
some experts, unless all are chosen (k = K). So with k < K its router starts *quiet*: rows scaled so that logits are
about 1e-6. It ranks the experts as the given router does, but weighs the chosen ones equally. The cost: the first
optimizer steps are larger than these rows, so a prototype start is soon forgotten, and the sum of weights can grow to
K/k as the router sharpens. Near-ties of a quiet router could mix slices of several bases, so with m > 1 the slices of a
base form a group (`group_limited_greedy`, k of K groups): whole FFNs, always, also after tuning.

In bf16 the Qwen classes also compute router logits in bf16, where two bases can tie; with m > 1 a tie can mix slices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from deepfusion.errors import InputError
from deepfusion.folders import place_to_replace, whole_folder
from deepfusion.models.checkpoints import (
    TensorReader,
    TensorWriter,
    check_same_tensors,
    copy_tokenizer,
    mean_tensor,
)

FAMILIES = ("qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "deepseek_v3")
_CLASSES: dict[str, tuple[type[PretrainedConfig], str]] = {
    "qwen2_moe": (Qwen2MoeConfig, "Qwen2MoeForCausalLM"),
    "qwen3_moe": (Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
    "deepseek": (Qwen2MoeConfig, "Qwen2MoeForCausalLM"),
    "deepseek_v2": (DeepseekV2Config, "DeepseekV2ForCausalLM"),
    "deepseek_v3": (DeepseekV3Config, "DeepseekV3ForCausalLM"),
}
BASES = {
    "qwen2_moe": "qwen2, or qwen2_moe with all layers dense",
    "qwen3_moe": "qwen3 without sliding window, or qwen3_moe with all layers dense",
    "deepseek": "llama without attention_bias and mlp_bias",
    "deepseek_v2": "deepseek_v2 with first_k_dense_replace >= num_hidden_layers and without mlp_bias",
    "deepseek_v3": "deepseek_v3, or deepseek_v2 without rope scaling, with first_k_dense_replace >= num_hidden_layers",
}
"""What dense model a family can be made of."""
_ROUTER_STD = 0.02
_QUIET_LOGIT = 1e-6  # below the 1e-5 of the contract, above the 6e-8 at which fp32 softmax scores near 1 tie
_FFN = re.compile(r"(model\.layers\.(\d+)\.mlp\.)(gate_proj|up_proj|down_proj)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_GATE = re.compile(r"layers\.(\d+)\.mlp\.gate$")


@dataclass(frozen=True)
class MoELayout:
    """How `experts` dense bases are laid out as one MoE.

    Args:
        family: one of `FAMILIES`.
        experts: K, the number of bases.
        top_k: bases consulted for each token; `split * top_k` routed experts are active.
        split: m, slices of each FFN; the MoE has `split * experts` routed experts.
        shared: "none", "zero" (mean FFN whose output starts at 0), or "average" (output half from the mean FFN, half
            routed).
        dense_layers: layers that keep one dense FFN, the mean over the bases. DeepSeek families: the first n layers.
        untie: write an output layer of its own where the base ties it to the embeddings.

    Raises:
        InputError: the numbers do not fit each other or the family.
    """

    family: str
    experts: int
    top_k: int
    split: int = 1
    shared: Literal["none", "zero", "average"] = "none"
    dense_layers: tuple[int, ...] = ()
    untie: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))
        _check_family(self.family)
        if not 1 <= self.top_k <= self.experts:
            raise InputError(
                f"top_k={self.top_k}",
                where="top_k",
                allowed=f"1..{self.experts} (experts)",
                code="layout-top-k",
            )
        if self.split < 1:
            raise InputError(
                f"split={self.split}", where="merge.split", allowed="1 or more", code="layout-split"
            )
        if self.shared not in ("none", "zero", "average"):
            raise InputError(
                f"unknown {self.shared!r}",
                where="merge.shared_expert",
                allowed="none, zero, average",
                code="layout-shared",
            )
        if self.family == "qwen3_moe" and self.shared != "none":
            raise InputError(
                "qwen3_moe has no shared expert",
                where="merge.shared_expert",
                allowed="none",
                code="layout-shared",
            )
        if self.family == "deepseek_v3" and self.routed == 1:
            raise InputError(
                "deepseek_v3 needs two routed experts",
                where="experts",
                allowed="2 or more",
                code="layout-experts",
            )

    @property
    def routed(self) -> int:
        """Number of routed experts."""
        return self.split * self.experts


def check_base(family: str, base_config: PretrainedConfig) -> None:
    """Checks that a dense base can become an MoE of `family`.

    Raises:
        InputError: unknown family, or a base of another architecture or with a part the MoE class lacks.
    """
    _check_family(family)
    kind = base_config.model_type
    match family, kind:
        case ("qwen2_moe", "qwen2"):
            fits = True
        case ("qwen3_moe", "qwen3"):
            fits = not base_config.use_sliding_window
        case ("qwen2_moe", "qwen2_moe") | ("qwen3_moe", "qwen3_moe"):
            fits = all(
                _is_dense_qwen_layer(base_config, layer) for layer in range(base_config.num_hidden_layers)
            )
        case ("deepseek", "llama"):
            fits = not base_config.attention_bias and not base_config.mlp_bias
        case ("deepseek_v2", "deepseek_v2"):
            fits = (
                base_config.first_k_dense_replace >= base_config.num_hidden_layers
                and not base_config.mlp_bias
            )
        case ("deepseek_v3", "deepseek_v3"):
            fits = base_config.first_k_dense_replace >= base_config.num_hidden_layers
        case (
            "deepseek_v3",
            "deepseek_v2",
        ):  # the dense layers are the same; the two scale extended rope differently
            dense = (
                base_config.first_k_dense_replace >= base_config.num_hidden_layers
                and not base_config.mlp_bias
            )
            fits = dense and base_config.rope_parameters.get("rope_type", "default") == "default"
        case _:
            fits = False
    if not fits:
        raise InputError(
            f"a base of type {kind} with these settings cannot become {family}",
            where="base",
            allowed=BASES[family],
            code="base-family",
        )


def moe_config(base_config: PretrainedConfig, layout: MoELayout) -> PretrainedConfig:
    """The config of the MoE that `layout` makes of bases with `base_config`, with the function-preserving settings.

    Raises:
        InputError: the base does not fit the family, or its sizes or layers do not fit the layout.
    """
    check_base(layout.family, base_config)
    width = _check_sizes(base_config, layout)
    config_class, architecture = _CLASSES[layout.family]
    known = set(config_class().to_dict()) | {"head_dim"}
    dropped = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    config = config_class(**{k: v for k, v in base_config.to_dict().items() if k in known - dropped})
    changes: dict[str, object] = {
        "architectures": [architecture],
        "tie_word_embeddings": base_config.tie_word_embeddings and not layout.untie,
        "moe_intermediate_size": width,
        "num_experts_per_tok": layout.split * layout.top_k,
        "norm_topk_prob": True,
    }
    if config_class in (Qwen2MoeConfig, Qwen3MoeConfig):
        changes |= {
            "num_experts": layout.routed,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(layout.dense_layers),
        }
    else:
        shared_experts = 0 if layout.shared == "none" else layout.split
        changes |= {"n_routed_experts": layout.routed, "n_shared_experts": shared_experts}
        changes |= {
            "first_k_dense_replace": len(layout.dense_layers),
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
        }
    if config_class is Qwen2MoeConfig:
        changes["shared_expert_intermediate_size"] = (
            0 if layout.shared == "none" else base_config.intermediate_size
        )
        changes["qkv_bias"] = base_config.model_type == "qwen2" or getattr(base_config, "qkv_bias", False)
    elif config_class is DeepseekV2Config:
        changes |= {
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "routed_scaling_factor": layout.experts / layout.top_k,
        }
        if layout.split > 1 and layout.top_k < layout.experts:
            changes |= {
                "topk_method": "group_limited_greedy",
                "n_group": layout.experts,
                "topk_group": layout.top_k,
            }
    elif config_class is DeepseekV3Config:
        changes["num_mtp_layers"] = 0  # the merge keeps no multi-token-prediction layers
    config.update(changes)
    return config


def merge_tensors(
    layout: MoELayout,
    readers: Sequence[TensorReader],
    base_config: PretrainedConfig,
    router: Tensor | None,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Streams the tensors of the MoE, under the names and shapes that `save_pretrained` would write.

    Expert i of a layer is a copy of the FFN of base i [DF eq. 12]; every other tensor is the element-wise mean,
    accumulated in fp32 and cast once to the bases' dtype [DF eq. 13].

    Args:
        readers: one for each base, in the order of the experts.
        router: fp32 [layers, K, hidden], the router row of each base; None for normal(0, 0.02) from `seed`.

    Raises:
        InputError: the bases differ in tensor names, shapes or dtypes, or do not fit the layout.
    """
    config = moe_config(base_config, layout)
    layers, hidden = base_config.num_hidden_layers, base_config.hidden_size
    if len(readers) != layout.experts:
        raise InputError(
            f"{len(readers)} bases", where="bases", allowed=f"{layout.experts} (experts)", code="bases-count"
        )
    check_same_tensors(readers)
    if router is None:
        router = (
            torch.randn(layers, layout.experts, hidden, generator=torch.Generator().manual_seed(seed))
            * _ROUTER_STD
        )
    if tuple(router.shape) != (layers, layout.experts, hidden):
        raise InputError(
            f"router of shape {tuple(router.shape)}",
            where="router",
            allowed=(layers, layout.experts, hidden),
            code="router-shape",
        )
    dtype = readers[0].dtype("model.embed_tokens.weight")
    for name in readers[0].names():
        ffn, layer = _FFN.fullmatch(name), _LAYER.match(name)
        beyond = layer is not None and int(layer[1]) >= layers
        if (
            beyond
            or name.endswith(".inv_freq")
            or (name == "lm_head.weight" and base_config.tie_word_embeddings)
        ):
            continue
        if ffn is None or int(ffn[2]) in layout.dense_layers:
            yield name, mean_tensor(readers, name)
        else:
            yield from _expert_tensors(layout, readers, name, config.moe_intermediate_size)
    if base_config.tie_word_embeddings and layout.untie:
        yield "lm_head.weight", mean_tensor(readers, "model.embed_tokens.weight")
    for number in range(layers):
        if number not in layout.dense_layers:
            yield from _router_tensors(layout, number, router[number], dtype)


def parameter_count(config: PretrainedConfig) -> dict[str, int]:
    """Exact number of parameters of a config, dense or MoE, counted on the meta device.

    Returns:
        {"total", "active", "computing"}: all; those of a token's experts and all that is not a routed expert; of
        the active ones those that are multiplied with, so no embeddings that are merely looked up. Tied embeddings
        count once.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if is_expert_name(name))
    active = total
    if experts:
        routed = getattr(config, "n_routed_experts", None) or config.num_experts
        active -= experts // routed * (routed - config.num_experts_per_tok)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {
        "total": total,
        "active": active,
        "computing": active - (0 if head is embeddings else embeddings.numel()),
    }


def is_expert_name(name: str) -> bool:
    """Whether a parameter or tensor name belongs to a routed expert (not to a shared one), fused or not."""
    return ".mlp.experts." in name


def expert_parameters(model: nn.Module) -> list[str]:
    """Names of the routed experts' parameters, which phase III freezes."""
    return [name for name, _ in model.named_parameters() if is_expert_name(name)]


def pinned_parameters(model: PreTrainedModel) -> list[str]:
    """Names of parameters that stay as they are, or the model leaves its architecture.

    These are the gates of the shared experts in the family `deepseek` (Qwen2Moe without qkv bias): v1 has none.
    """
    if model.config.model_type != "qwen2_moe" or model.config.qkv_bias:
        return []
    return [name for name, _ in model.named_parameters() if name.endswith(".mlp.shared_expert_gate.weight")]


@contextmanager
def router_logits_by_layer(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Records the router logits of every MoE layer while its block runs.

    Yields:
        A dict that each forward pass refills: layer index -> fp32 [tokens, routed experts], tokens = batch * sequence
        flattened, padding included; with gradient where the forward has one (gradient checkpointing: non-reentrant).
    """
    logits: dict[int, Tensor] = {}

    def record(layer: int, module: nn.Module, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        # Every router of transformers returns (logits, weights of the chosen, indices of the chosen).
        logits[layer] = output[0].float()

    gates = [
        (int(found[1]), module) for name, module in model.named_modules() if (found := _GATE.search(name))
    ]
    hooks = [module.register_forward_hook(partial(record, layer)) for layer, module in gates]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


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
        config.model_type != "qwen2_moe"
        or config.qkv_bias
        or config.mlp_only_layers != list(range(len(config.mlp_only_layers)))
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


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise InputError(
            f"unknown family {family!r}", where="family", allowed=", ".join(FAMILIES), code="family-unknown"
        )


def _is_dense_qwen_layer(config: PretrainedConfig, layer: int) -> bool:
    return (
        layer in config.mlp_only_layers
        or config.num_experts == 0
        or (layer + 1) % config.decoder_sparse_step != 0
    )


def _check_sizes(base_config: PretrainedConfig, layout: MoELayout) -> int:
    """Width of a routed expert, after checking that the base's sizes and layers fit the layout."""
    inner, hidden, layers = (
        base_config.intermediate_size,
        base_config.hidden_size,
        base_config.num_hidden_layers,
    )
    if inner % layout.split or inner // layout.split % 8 or hidden % 8:
        # The grouped matrix products that run experts want rows of whole 16 bytes, in bf16 too.
        raise InputError(
            f"FFNs of {hidden} x {inner} do not split into {layout.split}",
            where="merge.split",
            allowed="slices of a multiple of 8, and a hidden size of a multiple of 8",
            code="layout-split",
        )
    dense = layout.dense_layers
    if dense and not (dense[0] >= 0 and dense[-1] < layers and len(dense) < layers):
        raise InputError(
            f"dense layers {list(dense)} of {layers}",
            where="merge.dense_layers",
            allowed=f"some of 0..{layers - 1}, not all",
            code="layout-dense",
        )
    if layout.family.startswith("deepseek") and dense != tuple(range(len(dense))):
        raise InputError(
            f"dense layers {list(dense)}",
            where="merge.dense_layers",
            allowed=f"the first n layers for {layout.family}",
            code="layout-dense",
        )
    return inner // layout.split


def _expert_tensors(
    layout: MoELayout, readers: Sequence[TensorReader], name: str, width: int
) -> Iterator[tuple[str, Tensor]]:
    """One projection of the routed experts, [width, hidden] or [hidden, width] each, and of the shared expert."""
    found = _FFN.fullmatch(name)
    assert found is not None
    prefix, projection = found[1], found[3]
    is_down = projection == "down_proj"
    scale = layout.split * (0.5 if layout.shared == "average" else 1.0) if is_down else 1.0
    for base, reader in enumerate(readers):
        for part, piece in enumerate(reader.get(name).split(width, dim=1 if is_down else 0)):
            expert = base * layout.split + part
            yield f"{prefix}experts.{expert}.{projection}.weight", piece if scale == 1.0 else piece * scale
    if layout.family == "qwen3_moe":
        return
    gated = layout.family in (
        "qwen2_moe",
        "deepseek",
    )  # its gate of 0 halves the shared expert: sigmoid(0) = 1/2
    shared_name = f"{prefix}{'shared_expert' if gated else 'shared_experts'}.{projection}.weight"
    if layout.shared == "none":
        rows, columns = readers[0].shape(name)
        empty = (rows, 0) if is_down else (0, columns)
        yield shared_name, torch.empty(empty, dtype=readers[0].dtype(name))
        return
    mean = mean_tensor(readers, name)
    if is_down and layout.shared == "zero":
        mean = torch.zeros_like(mean)
    yield shared_name, mean * 0.5 if is_down and not gated else mean


def _router_tensors(
    layout: MoELayout, layer: int, rows: Tensor, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Router of one layer from `rows` fp32 [K, hidden]; the slices of a base share its row."""
    prefix, hidden = f"model.layers.{layer}.mlp.", rows.shape[1]
    largest = rows.norm(dim=1).max().item()
    if layout.family == "deepseek_v2" and layout.top_k < layout.experts and largest > 0:
        # Normed hidden states have a length of about sqrt(hidden), so a random row of length r gives logits of about r.
        rows = rows * (_QUIET_LOGIT / largest)
    yield f"{prefix}gate.weight", rows.repeat_interleave(layout.split, dim=0).to(dtype)
    if layout.family == "deepseek_v3":
        yield f"{prefix}gate.e_score_correction_bias", torch.zeros(layout.routed, dtype=torch.float32)
    if layout.family in ("qwen2_moe", "deepseek"):
        yield f"{prefix}shared_expert_gate.weight", torch.zeros(1, hidden, dtype=dtype)
