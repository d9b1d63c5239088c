"""Adapters as files: the update that we reckon is PEFT's own, and settings that mean another update are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device_models import make_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from deepfusion.errors import InputError
from deepfusion.models.adapters import adapter_shapes, check_adapter_config, open_adapter
from deepfusion.models.architecture import architecture

PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def tuned(folder: Path, kind: str, **changes: Any) -> Any:
    """A LoRA model with random updates in every linear layer, saved to `folder`."""
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **changes}
    model = get_peft_model(make_model(kind), LoraConfig(**settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_update_is_that_of_peft(tmp_path: Path, kind: str, use_rslora: bool) -> None:
    model = tuned(tmp_path, kind, use_rslora=use_rslora)
    adapter = open_adapter(tmp_path)
    known = architecture(make_model(kind).config)
    layers = dict(model.base_model.model.named_modules())
    assert adapter.targets
    for weight, layer in adapter.targets.items():
        change = adapter.update(weight, weight in known.transposed)
        expected = layers[layer].get_delta_weight("default")
        assert change.shape == known.tensors[weight]
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_shapes_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    tuned(tmp_path, kind)
    adapter = open_adapter(tmp_path)
    shapes = adapter_shapes(tmp_path, architecture(make_model(kind).config))
    assert shapes == {name: adapter.shape(name) for name in adapter.names()}


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"}, {"task_type": "SEQ_CLS"}, {"r": 0}, {"r": True}, {"r": 10**6}, {"lora_alpha": 0},
        {"lora_alpha": 1e9}, {"lora_alpha": True}, {"bias": "all"}, {"use_rslora": 1}, {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}, {"auto_mapping": {"parent_library": "os"}},
    ],
)  # fmt: skip
def test_settings_of_another_update_are_refused(changes: dict[str, Any]) -> None:
    assert check_adapter_config(PLAIN) is None
    assert check_adapter_config(PLAIN | changes)


@given(
    st.dictionaries(st.sampled_from([*PLAIN, "bias", "use_dora", "use_rslora"]) | st.text(max_size=9), JSON)
)
def test_any_settings_get_an_answer(values: dict[str, Any]) -> None:
    assert check_adapter_config(values) is None or check_adapter_config(values)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_a_damaged_file_is_the_users_error(tmp_path: Path, content: bytes) -> None:
    tuned(tmp_path, "llama")
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(InputError):
        open_adapter(tmp_path)
