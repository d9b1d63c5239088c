"""What a run distils into, where nobody said: the base and the number of experts that fit the models at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from device_models import save_checkpoint, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from deepfusion.config import load_config, parse_config
from deepfusion.errors import InputError
from deepfusion.families import bases
from deepfusion.models.architecture import parameter_total
from deepfusion.models.presets import model_config
from deepfusion.schema import Config
from deepfusion.uploads.intake import survey

SMALL = {
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def save(folder: Path, kind: str, hidden: int = 16, **changes: object) -> Path:
    config = AutoConfig.for_model(
        kind, **SMALL | {"hidden_size": hidden, "intermediate_size": 32, "num_key_value_heads": 2} | changes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def chosen(config: Config, folder: Path) -> tuple[str, str]:
    found = bases.with_base(config, bases.teachers_of_survey(survey(folder)))
    return Path(str(found.distill.base)).name, found.family


@pytest.mark.parametrize(
    ("kind", "family"), [("llama", "deepseek"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")]
)
def test_the_largest_model_that_can_be_a_base_is_one_and_the_family_follows(
    kind: str, family: str, tmp_path: Path
) -> None:
    save(tmp_path / "b", kind, 32)
    save(tmp_path / "a", kind, 32)
    save(tmp_path / "small", kind, 16)
    save_checkpoint(tmp_path / "larger", "gpt2")  # no family is made of it
    assert chosen(parse_config({}), tmp_path) == ("a", family)
    with_room = {"merge": {"shared_expert": "average"}}  # a layout that qwen3_moe does not have
    assert chosen(parse_config(with_room), tmp_path)[0] == ("None" if kind == "qwen3" else "a")


def test_a_family_that_was_named_stays(tmp_path: Path) -> None:
    save(tmp_path / "llama", "llama", 32)
    save(tmp_path / "qwen", "qwen2", 24)
    assert chosen(parse_config({}), tmp_path) == ("llama", "deepseek")
    assert chosen(parse_config({"family": "qwen2_moe"}), tmp_path) == ("qwen", "qwen2_moe")
    assert chosen(parse_config({"family": "qwen3_moe"}), tmp_path) == ("None", "qwen3_moe")


def test_a_base_that_was_named_stays_at_any_size(tmp_path: Path) -> None:
    save(tmp_path / "big", "llama", 32)
    named = parse_config({"distill": {"base": "tiny-qwen3"}})
    assert chosen(named, tmp_path) == ("tiny-qwen3", "qwen3_moe")
    config = load_config(overrides=["distill.base=tiny-qwen3", "devices=2", "device.types=[tinyllama]"])
    assert bases.with_base(config, bases.teachers_of_config(config)) == config


def test_a_model_that_cannot_be_laid_out_is_no_base(tmp_path: Path) -> None:
    save(tmp_path / "odd", "llama", 20, num_attention_heads=2)  # grouped products want a multiple of 8
    save(tmp_path / "even", "llama", 16)
    assert chosen(parse_config({}), tmp_path) == ("even", "deepseek")


def test_unreadable_models_are_no_bases(tmp_path: Path) -> None:
    save(tmp_path / "good", "llama", 16)
    path = save(tmp_path / "quantised", "llama", 32) / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}})
    )
    (save(tmp_path / "torn", "llama", 32) / "model.safetensors").write_bytes(b"x")
    assert chosen(parse_config({}), tmp_path) == ("good", "deepseek")


def test_a_base_much_smaller_than_its_teachers_is_refused_and_the_line_says_what_to_do() -> None:
    for types in ("[gpt2]", "[tinyllama, tiny-gpt2]"):
        config = load_config(overrides=["devices=2", f"device.types={types}"])
        with pytest.raises(
            InputError, match=r"tiny-qwen3 has 1\.12M weights.*--set distill\.base=.*\[base-too-small\]"
        ):
            bases.with_base(config, bases.teachers_of_config(config))


def test_the_packaged_types_and_bases_go_together() -> None:
    tiny = ["tiny-gpt2", "tiny-gpt2-medium", "tiny-llama", "tiny-olmo", "tiny-bloom"]
    for family in ("qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "deepseek_v3"):
        config = parse_config({"family": family, "devices": 2, "device": {"types": tiny}})
        assert bases.with_base(config, bases.teachers_of_config(config)) == config


@pytest.mark.parametrize(
    ("values", "count", "types", "experts", "top_k"),
    [
        ({}, 3, 1, 3, 2),
        ({}, 1, 1, 1, 1),
        ({}, 20, 2, 8, 2),
        ({}, 12, 12, 12, 2),  # a cluster for each type
        (
            {"clustering": {"proxies": 16}, "distill": {"trunk_share": 1.0}},
            12,
            12,
            8,
            2,
        ),  # as many without more experts
        ({"top_k": 3}, 9, 1, 8, 3),
        ({"top_k": 6}, 9, 1, 8, 6),
        ({"experts": 2}, 9, 1, 2, 2),
        ({"experts": 1}, 9, 1, 1, 1),
    ],
)
def test_the_number_of_experts_fits_the_models(
    values: dict, count: int, types: int, experts: int, top_k: int
) -> None:
    found = bases.with_experts(parse_config(values), count, types)
    assert (found.experts, found.top_k) == (experts, top_k)


def test_a_number_of_experts_that_was_named_is_not_bent() -> None:
    with pytest.raises(InputError, match="fewer-devices-than-experts"):
        bases.with_experts(parse_config({"experts": 5}), 4, 1)
    with pytest.raises(InputError, match="more-types-than-experts"):
        bases.with_experts(parse_config({"experts": 2}), 4, 3)


def test_amounts_are_written_as_people_do() -> None:
    written = {850: "850", 12_345: "12.3K", 1_120_000: "1.12M", 135_000_000: "135M", 7_240_000_000: "7.24B"}
    assert {number: bases.amount(number) for number in written} == written


def test_what_a_person_is_told_is_what_the_models_have() -> None:
    config = parse_config({"experts": 2, "devices": 3, "device": {"types": ["tiny-gpt2"]}})
    lines = bases.describe(config, bases.teachers_of_config(config) * 3, "devices")
    size = parameter_total(model_config("tiny-gpt2"))
    assert lines[0].startswith("base tiny-qwen3: 1.12M weights; MoE of 2 experts: ")
    assert lines[1] == f"devices: 3 tiny-gpt2 ({bases.amount(size)} weights each)"
