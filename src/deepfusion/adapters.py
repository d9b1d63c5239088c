"""LoRA adapters as files: what a plain one may say, and the exact update it stands for."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from deepfusion import models
from deepfusion.checkpoints import ADAPTER, ADAPTER_CONFIG, TensorReader
from deepfusion.errors import InputError

MAX_RANK = 1024

# Settings of PEFT that do not change what a plain LoRA adapter computes.
_FREE = {
    *("r", "lora_alpha", "use_rslora", "bias", "peft_type", "task_type", "target_modules", "exclude_modules"),
    *("fan_in_fan_out", "lora_dropout", "init_lora_weights", "inference_mode", "base_model_name_or_path", "revision"),
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
        self.scale = settings["lora_alpha"] / (math.sqrt(self.rank) if settings.get("use_rslora") else self.rank)

    def update(self, weight: str, transposed: bool) -> torch.Tensor:
        """The change of a target weight, `alpha/r B A` (rsLoRA: `alpha/sqrt(r) B A`), float32, shaped as the weight."""
        a, b = (self.get(f"base_model.model.{self.targets[weight]}.lora_{side}.weight").float() for side in "AB")
        change = self.scale * (b @ a)
        return change.T if transposed else change


def open_adapter(folder: Path) -> Adapter:
    """Opens the adapter in an upload folder.

    Raises:
        InputError: missing or damaged.
    """
    return Adapter(folder)


def adapter_shapes(folder: Path, known: models.Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that the adapter must hold for the layers it names, with its shape: A [r, in], B [out, r]."""
    adapter = Adapter(folder)
    if not adapter.targets:
        raise InputError("no LoRA matrices", where=folder / ADAPTER, code="tensor-missing")
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, layer in adapter.targets.items():
        shape = known.tensors.get(weight, ())
        if len(shape) != 2:
            raise InputError(f"{known.name} has no layer {layer[:200]}", where=folder / ADAPTER, code="tensor-extra")
        rows, columns = shape[::-1] if weight in known.transposed else shape
        shapes[f"base_model.model.{layer}.lora_A.weight"] = (adapter.rank, columns)
        shapes[f"base_model.model.{layer}.lora_B.weight"] = (rows, adapter.rank)
    return shapes


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"not a readable safetensors file ({error})", where=path, code="weights-damaged") from None
