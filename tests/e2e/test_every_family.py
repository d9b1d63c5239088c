"""Every family, recipe and kind of public text from devices to a checkpoint that loads and generates."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import overlay, run_settings, sentences, write_rows
from deepfusion.learning.corpus import read_corpus

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": (
        "qwen2_moe",
        {"recipe": "paper", "merge": {"shared_expert": "average"}, "distill": {"alpha": 0.5}},
    ),
    "fused, data-free": (
        "qwen3_moe",
        {"data": {"public": ["sampled"]}, "merge": {"split": 2, "router": "prototype"}},
    ),
    "generic text, first layer dense": (
        "deepseek",
        {
            "data": {"public": ["generic"]},
            "merge": {"dense_layers": [0], "shared_expert": "average", "split": 2},
        },
    ),
    "paper with latent attention": (
        "deepseek_v2",
        {"recipe": "paper", "data": {"public": ["generic", "sampled"]}},
    ),
    "sigmoid router, mixture": (
        "deepseek_v3",
        {
            "data": {"public": ["in_domain", "{file}", "sampled"]},
            "merge": {"router": "prototype", "shared_expert": "zero"},
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_family(name, settings, zoo, tmp_path):
    family, changes = CASES[name]
    generic = write_rows(tmp_path / "generic.jsonl", sentences("cooking", 20))
    changes = json.loads(json.dumps(changes).replace("{file}", str(generic)))
    settings = overlay(
        settings, family=family, distill={"base": str(zoo[family])}, data={"generic": [str(generic)]}
    )
    settings = overlay(settings, **changes)
    settings["devices"][0]["method"] = "lora"
    run_settings(settings, tmp_path / "run")

    wanted = {"in_domain": "public", str(generic): "public", "generic": "generic", "sampled": "sampled"}
    corpus = read_corpus(tmp_path / "run" / "bases" / "corpus.jsonl")
    assert {document.source for document in corpus} == {wanted[kind] for kind in settings["data"]["public"]}
    assert {document.teacher for document in corpus if document.source == "sampled"} <= {0, 1}
    has_trunk = (tmp_path / "run" / "bases" / "trunk").is_dir()
    assert has_trunk == (settings.get("recipe") != "paper")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "moe" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "moe" / "final")
    assert model.config.model_type == {"deepseek": "qwen2_moe"}.get(family, family)
    prompt = tokenizer("The bank sold", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert text.shape[1] == prompt.input_ids.shape[1] + 4
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text("utf-8"))
    assert all(
        torch.tensor(row["log_perplexity"]).isfinite() for row in evaluation["moe"]["by_domain"].values()
    )


def test_paper_recipe_freezes_experts_and_ours_trains_them(settings, tmp_path):
    for recipe in ("paper", "fused"):
        run_settings(
            overlay(settings, recipe=recipe, tune={"learning_rate": 0.01}), tmp_path / recipe, last="tune"
        )
        moe = tmp_path / recipe / "moe"
        before, after = (
            AutoModelForCausalLM.from_pretrained(moe / name).state_dict() for name in ("merged", "final")
        )
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert any(".gate.weight" in name for name in changed)
        assert any(".self_attn." in name for name in changed)
        assert any(".experts." in name for name in changed) == (recipe == "fused")


def test_handover_makes_one_schedule_of_distillation_and_tuning(settings, tmp_path):
    """The control has had no distillation, and starts from the whole rate."""
    changes = {
        "distill": {"learning_rate": 0.01, "handover": 0.5},
        "tune": {"learning_rate": 0.02, "control": True},
    }
    run_settings(overlay(settings, **changes), tmp_path / "run", last="tune")
    rates: dict[tuple[str, str], list[float]] = {}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        rates.setdefault((row["stage"], row["unit"]), []).append(row["learning_rate"])
    assert (
        rates["distill", "trunk"][-1] == min(rates["distill", "trunk"][1:]) == pytest.approx(0.005, rel=0.1)
    )
    assert max(rates["tune", "moe"]) == pytest.approx(0.01)
    assert max(rates["tune", "control"]) == pytest.approx(0.02)


def test_weights_do_not_depend_on_the_test_text(settings, tmp_path):
    """Two runs that differ in nothing but the test file end with the same weights: nothing of it is learned."""
    models = []
    for seed in (1, 2):
        test = write_rows(tmp_path / f"test{seed}.jsonl", sentences("cooking", 10, seed=seed))
        run_settings(overlay(settings, data={"test": str(test)}), tmp_path / f"run{seed}", last="tune")
        models.append((tmp_path / f"run{seed}" / "moe" / "final" / "model.safetensors").read_bytes())
    assert models[0] == models[1]
