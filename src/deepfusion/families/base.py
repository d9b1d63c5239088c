"""What a target MoE family is, and what all of them share: K dense bases become one Mixture-of-Experts checkpoint.

Every layout is *function preserving*: K identical bases give the base's own logits. With m = `split`, an FFN is cut
into m slices of its inner dimension, each a routed expert with its down-projection times m; the slices of a base share
one router row, so top-(m*k) picks whole FFNs. What makes the weights of the chosen experts add up to 1 is the family's
own matter, as is all else that depends on its class. A family is one object in one file, found by its name through
`get`; docs/guides/extending.md shows how to add one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deepfusion import plugins
from deepfusion.errors import InputError
from deepfusion.models.architecture import architecture, first_line
from deepfusion.models.checkpoints import TensorReader, check_same_tensors, mean_tensor

Scores = Literal["softmax", "sigmoid"]
_ROUTER_STD = 0.02
_FFN = re.compile(r"(model\.layers\.(\d+)\.mlp\.)(gate_proj|up_proj|down_proj)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_GATE = re.compile(r"layers\.(\d+)\.mlp\.gate$")


class Family(ABC):
    """One architecture of the resulting MoE.

    Attributes:
        name: in configs.
        config_class, architecture: the classes of transformers that compute it.
        bases: what dense models can become one, in words.
        tiny_base: the packaged base of those who name none; None where there is none.
        shared_experts: whether an expert that all tokens take is possible.
        leading_dense: which layers can stay dense: None any, else only the first n (True) or none (False).
        least_routed: routed experts that the class needs.
        scores: how the router turns logits into scores.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[PretrainedConfig]]
    architecture: ClassVar[str]
    bases: ClassVar[str]
    tiny_base: ClassVar[str | None] = None
    shared_experts: ClassVar[bool] = True
    leading_dense: ClassVar[bool | None] = None
    least_routed: ClassVar[int] = 1
    scores: ClassVar[Scores] = "softmax"

    @abstractmethod
    def fits(self, base: PretrainedConfig) -> bool:
        """Whether a dense model can become an MoE of this family, without a part that the MoE class lacks."""

    @abstractmethod
    def settings(self, base: PretrainedConfig, layout: MoELayout, width: int) -> dict[str, Any]:
        """What the config of the MoE says beyond what it takes over from the base.

        Args:
            width: inner size of a routed expert.
        """

    def owns(self, config: PretrainedConfig) -> bool:
        """Whether a config of `config_class` is of this family, where several share a class."""
        return True

    def expert_tensor(self, prefix: str, expert: int, projection: str) -> str:
        """Stored name of a routed expert's weight; `prefix` is that of the FFN, such as `model.layers.0.mlp.`."""
        return f"{prefix}experts.{expert}.{projection}.weight"

    def shared_tensors(
        self, layout: MoELayout, readers: Sequence[TensorReader], name: str, prefix: str, projection: str
    ) -> Iterator[tuple[str, Tensor]]:
        """One projection of the shared expert; nothing where the family has none."""
        return iter(())

    def router_tensors(
        self, layout: MoELayout, prefix: str, rows: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Router of one layer from `rows` fp32 [K, hidden]; the slices of a base share its row."""
        yield f"{prefix}gate.weight", rows.repeat_interleave(layout.split, dim=0).to(dtype)

    def pinned(self, name: str) -> bool:
        """Whether a parameter stays as it is, or the model leaves its architecture."""
        return False

    def pruned(self, config: PretrainedConfig, bases: int, kept: int) -> dict[str, Any]:
        """What changes in the config of an MoE of `bases` bases where only `kept` of them are left, beyond the numbers
        of routed and of chosen experts.

        Raises:
            InputError: it cannot be done.
        """
        return {}


def names() -> list[str]:
    """The families that there are."""
    return plugins.names("families")


def get(name: str) -> Family:
    """The family of that name.

    Raises:
        InputError: there is none.
    """
    if name not in names():
        raise InputError(
            f"unknown family {name!r}", where="family", allowed=", ".join(names()), code="family-unknown"
        )
    return plugins.load("families", name)


def of(config: PretrainedConfig) -> Family | None:
    """The family of an MoE's config; None for models of other makers."""
    for name in names():
        try:
            found = get(name)
        except InputError:
            continue  # one that cannot be loaded makes nothing, and whoever names it is told
        if type(config) is found.config_class and found.owns(config):
            return found
    return None


@dataclass(frozen=True)
class MoELayout:
    """How `experts` dense bases are laid out as one MoE.

    Args:
        family: its name.
        experts: K, the number of bases.
        top_k: bases consulted for each token; `split * top_k` routed experts are active.
        split: m, slices of each FFN; the MoE has `split * experts` routed experts.
        shared: "none", "zero" (mean FFN whose output starts at 0), or "average" (output half from the mean FFN, half
            routed).
        dense_layers: layers that keep one dense FFN, the mean over the bases, in ascending order.
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
        family = get(self.family)
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
        if self.shared != "none" and not family.shared_experts:
            raise InputError(
                f"{self.family} has no shared expert",
                where="merge.shared_expert",
                allowed="none",
                code="layout-shared",
            )
        if self.routed < family.least_routed:
            raise InputError(
                f"{self.family} needs {family.least_routed} routed experts", where="experts",
                allowed=f"{family.least_routed} or more", code="layout-experts",
            )  # fmt: skip

    @property
    def routed(self) -> int:
        """Number of routed experts."""
        return self.split * self.experts


def check_base(family: str, base_config: PretrainedConfig) -> None:
    """Checks that a dense base can become an MoE of `family`.

    Raises:
        InputError: unknown family, or a base of another architecture or with a part the MoE class lacks.
    """
    target = get(family)
    if not target.fits(base_config):
        what = f"a base of type {base_config.model_type} with these settings cannot become {family}"
        raise InputError(what, where="base", allowed=target.bases, code="base-family")


def moe_config(base_config: PretrainedConfig, layout: MoELayout) -> PretrainedConfig:
    """The config of the MoE that `layout` makes of bases with `base_config`, with the function-preserving settings.

    Raises:
        InputError: the base does not fit the family, or its sizes or layers do not fit the layout.
    """
    check_base(layout.family, base_config)
    family, width = get(layout.family), _check_sizes(base_config, layout)
    known = set(family.config_class().to_dict()) | {"head_dim"}
    dropped = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    config = family.config_class(**{k: v for k, v in base_config.to_dict().items() if k in known - dropped})
    shared: dict[str, Any] = {
        "architectures": [family.architecture],
        "tie_word_embeddings": base_config.tie_word_embeddings and not layout.untie,
        "num_experts_per_tok": layout.split * layout.top_k,
    }
    config.update(shared | family.settings(base_config, layout, width))
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
    family, width = get(layout.family), _check_sizes(base_config, layout)
    check_base(layout.family, base_config)
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
            yield from _expert_tensors(family, layout, readers, name, width)
    if base_config.tie_word_embeddings and layout.untie:
        yield "lm_head.weight", mean_tensor(readers, "model.embed_tokens.weight")
    for number in range(layers):
        if number not in layout.dense_layers:
            yield from family.router_tensors(layout, f"model.layers.{number}.mlp.", router[number], dtype)


def check_family(layout: MoELayout, base_config: PretrainedConfig) -> PretrainedConfig:
    """Check that what a family, if it is not of this package, makes of such bases is what its class reads; needs no
    weights.

    Returns:
        The config of the MoE.

    Raises:
        InputError: the layout or the base does not fit, or the tensors are not those of the class (`family-broken`).
    """
    config = moe_config(base_config, layout)
    if plugins.is_ours(get(layout.family)):
        return config
    readers: Any = [_Shapes(architecture(base_config).tensors)] * layout.experts
    sizes = base_config.num_hidden_layers, layout.experts, base_config.hidden_size
    try:
        tensors = dict(merge_tensors(layout, readers, base_config, torch.empty(sizes, device="meta")))
        read: Any = getattr(transformers, get(layout.family).architecture).from_pretrained(
            None, config=config, state_dict=tensors, device_map="meta", ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # other people's code, and how a class fails on tensors that are not its own
        raise _broken_family(layout, f"cannot be read ({first_line(error)})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(read[1][problem], key=str):
            raise _broken_family(layout, f"has {len(found)} {problem.replace('_', ' ')}, such as {found[0]}")
    return config


def _broken_family(layout: MoELayout, what: str) -> InputError:
    family = get(layout.family)
    what = f"what {layout.family} makes of the bases, read as {family.architecture}, {what}"
    return InputError(what, where="family", fix=f"mend {type(family).__module__}", code="family-broken")


class _Shapes:
    """The tensors of a checkpoint without their values, read like a `TensorReader`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes, self.folder = shapes, "the base"

    def names(self) -> list[str]:
        return sorted(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shapes[name])

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def get(self, name: str) -> Tensor:
        return torch.empty(self.shape(name), device="meta")


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
    return ".experts." in name


def expert_parameters(model: nn.Module) -> list[str]:
    """Names of the routed experts' parameters, which phase III freezes."""
    return [name for name, _ in model.named_parameters() if is_expert_name(name)]


def pinned_parameters(model: PreTrainedModel) -> list[str]:
    """Names of parameters that stay as they are, or the model leaves its architecture."""
    family = of(model.config)
    return [name for name, _ in model.named_parameters() if family is not None and family.pinned(name)]


def scores_of(config: PretrainedConfig) -> Scores:
    """How the router of an MoE turns logits into scores."""
    family = of(config)
    return "softmax" if family is None else family.scores


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
    first = get(layout.family).leading_dense
    if dense and (first is False or (first and dense != tuple(range(len(dense))))):
        raise InputError(
            f"dense layers {list(dense)}",
            where="merge.dense_layers",
            allowed=f"the first n layers for {layout.family}" if first else f"none for {layout.family}",
            code="layout-dense",
        )
    return inner // layout.split


def _expert_tensors(
    family: Family, layout: MoELayout, readers: Sequence[TensorReader], name: str, width: int
) -> Iterator[tuple[str, Tensor]]:
    """One projection of the routed experts, [width, hidden] or [hidden, width] each, and of the shared expert."""
    found = _FFN.fullmatch(name)
    assert found is not None
    prefix, projection = found[1], found[3]
    is_down = projection == "down_proj"
    scale = layout.split * (0.5 if layout.shared == "average" else 1.0) if is_down else 1.0
    for base, reader in enumerate(readers):
        for part, piece in enumerate(reader.get(name).split(width, dim=1 if is_down else 0)):
            stored = family.expert_tensor(prefix, base * layout.split + part, projection)
            yield stored, piece if scale == 1.0 else piece * scale
    yield from family.shared_tensors(layout, readers, name, prefix, projection)


def shared_mean(
    layout: MoELayout, readers: Sequence[TensorReader], name: str, projection: str, half: bool
) -> Tensor:
    """A weight of the shared expert: the mean of the bases' FFNs, of no size without one, its output 0 to begin with
    where the layout says zero.

    Args:
        half: halve the output of an average one; classes whose gate does that say False.
    """
    is_down = projection == "down_proj"
    if layout.shared == "none":
        rows, columns = readers[0].shape(name)
        return torch.empty((rows, 0) if is_down else (0, columns), dtype=readers[0].dtype(name))
    mean = mean_tensor(readers, name)
    if is_down and layout.shared == "zero":
        mean = torch.zeros_like(mean)
    return mean * 0.5 if is_down and half else mean
