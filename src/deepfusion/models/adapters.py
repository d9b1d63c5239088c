"""Adapters as files: what a plain LoRA one may say, the exact update it stands for, and any of PEFT's merged into its
base.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from deepfusion.errors import InputError
from deepfusion.models import formats
from deepfusion.models.architecture import Architecture, first_line
from deepfusion.models.checkpoints import ADAPTER, ADAPTER_CONFIG, TensorReader
from deepfusion.models.loading import load_model

MAX_RANK = 1024

# Settings of PEFT that do not change what a plain LoRA adapter computes.
_FREE = {
    *("r", "lora_alpha", "use_rslora", "bias", "peft_type", "task_type", "target_modules", "exclude_modules"),
    *(
        "fan_in_fan_out",
        "lora_dropout",
        "init_lora_weights",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
    ),
    *("peft_version", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def check_adapter_config(values: dict[str, Any]) -> str | None:
    """What is wrong with the settings of an adapter that must be plain LoRA; None if nothing is."""
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if values.get("peft_type") != "LORA" or values.get("task_type") != "CAUSAL_LM":
        return "only LoRA adapters of causal language models are taken"
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        return f"r is not between 1 and {MAX_RANK}"
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1e4:
        return "lora_alpha is not a sensible number"
    if not isinstance(values.get("use_rslora", False), bool) or values.get("bias", "none") != "none":
        return "use_rslora is not true or false, or bias is trained"
    # Whatever else is set changes the update (DoRA, rank patterns, ...), or names code.
    unusual = sorted(key for key, value in values.items() if key not in _FREE and value)
    return f"{unusual[0][:60]} is set: only plain LoRA is taken" if unusual else None


class Adapter(TensorReader):
    """The tensors of `adapter_model.safetensors`, read one at a time.

    Attributes:
        targets: names of the weights that it updates, as in the whole model -> name of the layer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {ADAPTER: _open(folder / ADAPTER)}
        self._file_of = dict.fromkeys(self._files[ADAPTER].keys(), ADAPTER)
        found = [match for name in self._file_of if (match := _LORA.fullmatch(name))]
        self.targets = {f"{match[1]}.weight": match[1] for match in found}
        settings = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        self.rank = int(settings["r"])
        self.scale = settings["lora_alpha"] / (
            math.sqrt(self.rank) if settings.get("use_rslora") else self.rank
        )

    def update(self, weight: str, transposed: bool) -> torch.Tensor:
        """The change of a target weight, `alpha/r B A` (rsLoRA: `alpha/sqrt(r) B A`), float32, shaped as the weight."""
        a, b = (
            self.get(f"base_model.model.{self.targets[weight]}.lora_{side}.weight").float() for side in "AB"
        )
        change = self.scale * (b @ a)
        return change.T if transposed else change


def open_adapter(folder: Path) -> Adapter:
    """Opens the adapter in an upload folder.

    Raises:
        InputError: missing or damaged.
    """
    return Adapter(folder)


def adapter_shapes(folder: Path, known: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that the adapter must hold for the layers it names, with its shape: A [r, in], B [out, r]."""
    adapter = Adapter(folder)
    if not adapter.targets:
        raise InputError("no LoRA matrices", where=folder / ADAPTER, code="tensor-missing")
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, layer in adapter.targets.items():
        shape = known.tensors.get(weight, ())
        if len(shape) != 2:
            raise InputError(
                f"{known.name} has no layer {layer[:200]}", where=folder / ADAPTER, code="tensor-extra"
            )
        rows, columns = shape[::-1] if weight in known.transposed else shape
        shapes[f"base_model.model.{layer}.lora_A.weight"] = (adapter.rank, columns)
        shapes[f"base_model.model.{layer}.lora_B.weight"] = (rows, adapter.rank)
    return shapes


def check_mergeable(folder: Path, settings: dict[str, Any]) -> None:
    """Checks before any work that an adapter of whatever kind can be merged, by its settings and files.

    Args:
        settings: of `adapter_config.json`.

    Raises:
        InputError: it is of another task, of a kind that has no merge, pickled, or names code to import.
    """
    kind, task = settings.get("peft_type"), settings.get("task_type")
    where, code = folder / ADAPTER_CONFIG, "bad-adapter-config"
    if task not in (None, "CAUSAL_LM"):
        raise InputError(f"an adapter for {task}", where=where, allowed="CAUSAL_LM", code=code)
    if not any(
        hasattr(tuner, "merge_and_unload")
        for name, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if name == kind
    ):
        raise InputError(
            f"an adapter of type {kind}, which cannot be merged",
            where=where,
            allowed="LORA and its like",
            code=code,
        )
    if settings.get("megatron_config"):
        raise InputError(
            "megatron_config is refused: it imports code", where=where, fix="remove it", code=code
        )
    if not (folder / ADAPTER).is_file():
        pickled = any(folder.glob("*.bin"))
        what = "only pickled weights, which can run code and are not read" if pickled else f"no {ADAPTER}"
        raise InputError(
            what, where=folder, fix="save it with save_pretrained of a current PEFT", code="weights-missing"
        )


def merged_model(folder: Path, base: Path) -> PreTrainedModel:
    """The model that an adapter makes of its base, in fp32, with no trace of the adapter.

    Args:
        folder: an adapter that `check_mergeable` has let through.
        base: its checkpoint.

    Raises:
        InputError: the two do not fit, or merging would change what they compute.
    """
    model = load_model(base)
    stored = load_file(folder / ADAPTER) if _open(folder / ADAPTER) else {}
    rows = {len(t) for name,
    t in stored.items() if re.search(r"(embed_tokens|lm_head|wte|word_embeddings)(\.\w+)*\.weight", name)
            and t.ndim == 2 and "lora_" not in name}  # fmt: skip
    if rows and rows != {model.config.vocab_size}:
        model.resize_token_embeddings(max(rows), mean_resizing=False)  # tokens that came with the adapter
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode, settings.task_type = True, settings.task_type or "CAUSAL_LM"
        settings.base_model_name_or_path = model.name_or_path
        adapted: Any = get_peft_model(model, settings)
        found = adapted.load_adapter(str(folder), "default")
        unread = [*found.missing_keys, *found.unexpected_keys]
        if unread:
            what = (
                f"{len(unread)} tensors of the adapter do not fit the base {base.name}, such as {unread[0]}"
            )
            raise InputError(what, where=folder, code="adapter-differs")
        probe = torch.arange(2, min(18, model.config.vocab_size))[None]
        with torch.no_grad():
            wanted = adapted.eval()(probe).logits
            merged = formats.plain_model(adapted.merge_and_unload(safe_merge=True), torch.float32)
            off = float((merged(probe).logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    except InputError:
        raise
    except (
        Exception
    ) as error:  # PEFT fails in many ways on settings that are not of its version or do not fit the base
        what = f"PEFT cannot merge it into {base.name} ({first_line(error)})"
        raise InputError(what, where=folder, code="adapter-differs") from None
    if not off < 1e-2:
        fix = "merge it where it was trained, and give the whole model"
        what = (
            f"merged into {base.name} it computes something else, as where tied embeddings were adapted apart"
        )
        raise InputError(what, where=folder, fix=fix, code="adapter-differs")
    return merged


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"not a readable safetensors file ({error})", where=path, code="weights-damaged"
        ) from None
