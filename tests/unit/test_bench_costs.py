"""The costs of FedJETS and ours: byte counts against real files, sizes against published ones, tables from their
JSON.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from device_models import DIMENSIONS, make_model, save_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from deepfusion.errors import InputError
from deepfusion.families.base import MoELayout, moe_config
from deepfusion.learning.memory import estimate_training_bytes
from deepfusion.models import compact
from deepfusion.models.architecture import architecture, parameter_total
from deepfusion.models.presets import LORA_TARGETS, model_config
from deepfusion_bench import costs

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "costs.json"
SMALL_MOE = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def communication() -> dict[str, Any]:
    return costs.communication()


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text("utf-8"))
    return found


def stored_bytes(folder: Path) -> int:
    """Bytes of the tensors in the only safetensors file of a folder: all but its header."""
    (file,) = folder.glob("*.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little")
    return file.stat().st_size - 8 - header


@pytest.mark.parametrize("kind", DIMENSIONS)
def test_an_upload_has_the_bytes_that_are_written(kind: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", kind)
    counted = costs.upload_bytes(base.config)
    assert counted["weights, fp32"] == stored_bytes(tmp_path / "base")
    trained = make_model(kind, seed=1)  # another seed changes every weight matrix
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    for encoding in ("delta8", "delta4"):
        (tmp_path / encoding).mkdir()
        compact.write_delta(
            tmp_path / encoding, trained.state_dict(), compact.open_base(str(tmp_path / "base")), encoding
        )
        assert counted[encoding] == stored_bytes(tmp_path / encoding)
    torch.nn.Module.to(trained, torch.bfloat16)
    trained.save_pretrained(tmp_path / "bf16")
    assert counted["weights, bf16"] == stored_bytes(tmp_path / "bf16")
    settings = LoraConfig(r=costs.LORA_RANK, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(str(tmp_path / "lora"))
    assert counted["LoRA, rank 16"] == stored_bytes(tmp_path / "lora")


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [0]}])
def test_a_pruned_moe_has_the_bytes_that_are_written(changes: dict[str, Any], tmp_path: Path) -> None:
    config = costs.pruned(AutoConfig.for_model("qwen2_moe", **SMALL_MOE, **changes), 3)
    torch.nn.Module.to(AutoModelForCausalLM.from_config(config), torch.bfloat16).save_pretrained(tmp_path)
    counted = costs.travelling_bytes(config)
    assert counted["all"] == stored_bytes(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        names = file.keys()
        specific = [name for name in names if ".mlp.experts." in name or ".mlp.gate." in name]
        assert counted["experts"] == sum(file.get_tensor(name).nbytes for name in specific)
    layers = 3 - len(changes.get("mlp_only_layers", []))
    assert counted["experts"] == 2 * layers * 3 * (3 * 16 * 8 + 16)


def test_pruning_leaves_the_global_moe_alone() -> None:
    config = AutoConfig.for_model("qwen2_moe", **SMALL_MOE)
    assert costs.pruned(config, 1).num_experts_per_tok == 1
    assert costs.pruned(config, 4).num_experts_per_tok == 2
    assert config.num_experts == 6


def test_the_global_moes_have_the_published_sizes(communication: dict[str, Any]) -> None:
    medical, finance = (case["moe"] for case in communication["cases"].values())
    assert medical["total"] == 14_315_784_192  # "14.3B parameters in total and 2.7B activated", model card
    assert round(medical["active"] / 1e9, 1) == 2.7
    assert (
        finance["total"] == 16_375_728_128
    )  # "16.4B parameters", model card; without a gate of the shared experts
    assert round(finance["active"] / 1e9, 1) == 2.8
    for moe in (medical, finance):  # a token consults all experts that are left
        assert moe["bf16"]["all"] == pytest.approx(2 * moe["active"], rel=0.01)


def test_on_device_models_have_the_published_sizes(communication: dict[str, Any]) -> None:
    devices = [case["ours"]["by_type"] for case in communication["cases"].values()]
    assert {type: kinds["weights, bf16"] // 2 for types in devices for type, kinds in types.items()} == {
        "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "tinyllama": 1_100_048_384, "olmo-1b": 1_176_764_416,
        "bloom-1b1": 1_065_314_304,
    }  # fmt: skip


def test_totals_and_savings_follow_from_one_device(communication: dict[str, Any]) -> None:
    for case in communication["cases"].values():
        mean = sum(kinds["delta8"] for kinds in case["ours"]["by_type"].values()) / 3
        assert case["ours"]["total"]["delta8"]["64"] == round(64 * mean)
        whole, experts = case["moe"]["bf16"]["all"], case["moe"]["bf16"]["experts"]
        by_device = list(case["fedjets"]["by_device"].values())
        assert by_device == [8 * whole, 7 * experts + whole, 2 * whole, experts + whole, experts]
        for name, each in case["fedjets"]["by_device"].items():
            assert case["saving"]["delta8"][name] == pytest.approx(1 - mean / each)


def test_rounds_are_at_least_one() -> None:
    with pytest.raises(InputError, match="bad-rounds"):
        costs.communication(rounds=0)


def test_memory_compares_like_with_like(stored: dict[str, Any]) -> None:
    for case in stored["memory"]["cases"].values():
        few, many = case["experts_kept"]
        for row in case["rows"]:
            assert row["bytes"][few] < row["bytes"][many]
            assert all(row["bytes"][type] < row["bytes"][few] for type in case["paper"]["ours"])
        full = {
            (row["precision"], row["batch"]): row["bytes"] for row in case["rows"] if row["method"] == "full"
        }
        compared = [row for row in case["comparisons"] if row["ours"] == row["fedjets"] == "full"]
        assert len(compared) == len(full)
        for row in compared:
            sizes = full[row["precision"], row["batch"]]
            assert row["ratio"][few] == {type: sizes[few] / sizes[type] for type in case["paper"]["ours"]}


def test_an_eighth_is_an_eighth_in_every_part() -> None:
    for case in costs.CASES.values():
        for config in (*map(model_config, case.types), costs.pruned(case.moe, case.moe.num_experts_per_tok)):
            whole, part = architecture(config).tensors, architecture(costs.eighth(config)).tensors
            embeddings = sum(
                math.prod(shape)
                for name, shape in whole.items()
                if ".layers." not in name and ".h." not in name
            )
            small = sum(
                math.prod(shape)
                for name, shape in part.items()
                if ".layers." not in name and ".h." not in name
            )
            assert 8 * small == pytest.approx(embeddings, rel=1e-3)
            assert 8 * sum(map(math.prod, part.values())) == pytest.approx(
                sum(map(math.prod, whole.values())), rel=0.01
            )


def test_the_tables_follow_from_the_json_alone(stored: dict[str, Any], communication: dict[str, Any]) -> None:
    assert stored["communication"] == json.loads(json.dumps(communication)), "make the stored result again"
    text = costs.tables(stored)
    assert text == costs.tables(json.loads(RESULT.read_text("utf-8")))
    without = costs.tables({key: stored[key] for key in ("communication", "memory")})
    assert text.startswith(without.rstrip("\n"))
    assert "(measured)" not in without
    for figure in ("14,315,784,192", "5.37 GB", "| weights, bf16 | 0.249 | 0.710 | 2.20 |", "FedJETS, tiny"):
        assert figure in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 12
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1, lines[0]


def test_the_estimate_holds_against_the_stored_measurements(stored: dict[str, Any]) -> None:
    for name, one in stored["measured"]["models"].items():
        assert 0.9 < one["estimate"] / one["peak"] < 1.1, name


@pytest.mark.slow
def test_the_stored_memory_is_what_the_estimate_says(stored: dict[str, Any]) -> None:
    assert stored["memory"] == json.loads(json.dumps(costs.memory())), "make the stored result again"


@pytest.mark.slow
def test_each_peak_is_that_of_its_own_process(tmp_path: Path) -> None:
    medium = costs.eighth(model_config("gpt2-medium"))
    layout = MoELayout("qwen3_moe", experts=4, top_k=2)
    tiny = costs.pruned(moe_config(model_config("tiny-qwen3"), layout), 2)
    peaks = costs.trained_peaks({"medium": medium, "tiny": tiny}, tmp_path, batch=1, tokens=64, steps=2)
    assert not list(tmp_path.iterdir())
    for name, config in (("medium", medium), ("tiny", tiny)):
        assert 0.8 < estimate_training_bytes(config, "full", 1, 64) / peaks[name] < 1.2
    assert peaks["medium"] - peaks["tiny"] > 12 * parameter_total(medium)


def test_a_training_that_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too-little-memory"):
        costs.trained_peaks({"whole": costs.CASES["medical"].moe}, tmp_path, batch=1, tokens=16, steps=2)
