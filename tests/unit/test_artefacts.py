"""Model cards say what was done, in every mode, and quote the mean that everything else quotes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from device_models import entry as registered
from device_models import grouped, save_checkpoint
from rich.console import Console

from conftest import overlay, run_settings
from deepfusion import pipeline
from deepfusion.config import parse_config
from deepfusion.records import Comparison, Registry, RegistryEntry
from deepfusion.report.artefacts import cell, write_final_card
from deepfusion.report.page import render, summary_table
from deepfusion.stages import distill


def entry(device: str, tokens: int) -> RegistryEntry:
    return registered(device, tokens=tokens, documents=tokens // 10, type="gpt2")


def metrics(loss: float, tokens: tuple[int, int] = (900, 100)) -> dict[str, Any]:
    """Of a model on a long and a short domain: its mean over all tokens is far from its mean over domains."""
    rows = {
        name: {"log_perplexity": value, "bits_per_byte": value / 2, "token_accuracy": value / 20,
        "choice_accuracy": choice,
               "acc": choice, "acc_norm": choice, "perplexity": 2.0, "tokens": count, "examples": 5}
        for (name, value, choice), count in zip((("long", loss, 0.25), ("short", loss + 2, None)), tokens, strict=True)
    }  # fmt: skip
    keys = ("log_perplexity", "bits_per_byte", "token_accuracy")
    pooled = {key: sum(row[key] * row["tokens"] for row in rows.values()) / sum(tokens) for key in keys}
    means = {key: sum(row[key] for row in rows.values()) / 2 for key in keys}
    counts = {
        "tokens": sum(tokens),
        "examples": 10,
        "choice_accuracy": 0.25,
        "acc": 0.25,
        "acc_norm": 0.25,
        "perplexity": 2.0,
    }
    return {**pooled, **counts, "mean_over_domains": {**means, "choice_accuracy": 0.25}, "by_domain": rows}


def card(run: Path, registry: list[RegistryEntry] | None, **config: Any) -> str:
    run.mkdir(exist_ok=True)
    if registry is not None:
        Registry(registry).write(run / "registry.json")
        grouped(*([one.device] for one in registry)).write(run / "clusters.json")
    write_final_card(parse_config(config), run, run)
    return (run / "README.md").read_text("utf-8")


def test_of_uploads(tmp_path: Path) -> None:
    text = card(tmp_path, [entry("a", 1200), entry("b", 30)])
    assert "of 2 models that devices fine-tuned on text of their own" in text
    assert "1,200" in text
    assert "not known" not in text
    assert "No private text of a device was read" in text


def test_of_plain_checkpoints(tmp_path: Path) -> None:
    text = card(tmp_path, [entry("a", 0), entry("b", 0), entry("c", 0)], data={"public": ["sampled"]})
    assert "of 3 checkpoints that were given; how they were trained is not known" in text
    for claim in ("never left", "devices", "federated-learning", "No private text", "| 0 |\n", " 0 | `"):
        assert claim not in text
    assert text.count("| unknown |") == 3
    assert "text that the proxies wrote" in text
    assert "public text" not in text.lower()


def test_of_both(tmp_path: Path) -> None:
    text = card(tmp_path, [entry("a", 50), entry("b", 0)])
    assert "of 1 model that devices fine-tuned" in text
    assert "and of 1 checkpoint that was given; how they were trained is not known" in text


def test_of_an_empty_folder(tmp_path: Path) -> None:
    text = card(tmp_path, None)
    for claim in ("devices fine-tuned", "checkpoints that", "Lineage", "Held-out", "proxies, "):
        assert claim not in text


def test_without_any_training(tmp_path: Path) -> None:
    text = card(tmp_path, [entry("a", 5)], distill={"steps": 0}, tune={"steps": 0})
    assert "Not tuned after the merge" in text
    assert "No text was read to make it" in text
    assert "Tuned for" not in text
    assert "Tuned for 7 steps" in card(tmp_path, [entry("a", 5)], tune={"steps": 7})


def test_more_proxies_than_experts_are_not_called_experts(tmp_path: Path) -> None:
    text = card(tmp_path, [entry(name, 5) for name in "abcdef"], experts=2)
    assert "6 proxies, 2 experts" in text
    assert "| proxy | type | model of |" in text


def test_cells_are_harmless() -> None:
    assert cell("a|b\n<script>`x`\x1b[31m") == "a\\|b &lt;script>'x' [31m"


def test_one_mean_everywhere(tmp_path: Path) -> None:
    evaluation = {
        "moe": metrics(3.0), "references": {"base": metrics(5.0), "no_distillation": None, "devices": None,
        "proxies": None},
        "comparison": dict.fromkeys(Comparison.model_fields), "expert_use": None, "proxy_against_members": None,
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    text = card(tmp_path, [entry("a", 5), entry("b", 5)])
    assert "Mean over the domains long, short" in text
    assert "| this model | 4.000 | 2.000 | 20.0% | 25.0% |" in text
    html = render(tmp_path)
    assert re.search(r"<b>20\.0 %</b><span>token accuracy, mean over 2 domains", html)
    console = Console(width=120, record=True)
    console.print(summary_table(tmp_path))
    shown = console.export_text()
    assert re.search(r"DeepFusion MoE .*4\.000 +20\.0% +25\.0%", shown)
    for pooled in ("3.200", "1.600", "16.0%", "16.0 %"):
        assert pooled not in text + html + shown


def test_cards_of_a_fusion_of_plain_checkpoints(
    zoo: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Every card of the run folder, through the stages that write them."""
    for number, name in enumerate(("one", "two")):
        save_checkpoint(tmp_path / "given" / name, "gpt2", seed=number)
    values = overlay(
        settings, data={"public": ["sampled"], "private": []}, distill={"steps": 0}, tune={"steps": 0}
    )
    del values["devices"]
    run = tmp_path / "run"
    run_settings(values, run, instead=[pipeline.given(tmp_path / "given")], last="tune")
    cards = {
        path.parent.relative_to(run).as_posix(): path.read_text("utf-8") for path in run.rglob("README.md")
    }
    assert {"moe/final", "moe/control", "moe/merged", "moe/untaught", "bases/0", "proxies/0"} <= set(cards)
    assert "how they were trained is not known" in cards["moe/final"]
    assert "The one model of its cluster" in cards["proxies/0"]
    assert "| one | unknown | unknown |" in cards["proxies/0"] + cards["proxies/1"]
    assert "distilled" not in cards["bases/0"]
    assert "without any step of its own" in cards["bases/0"]
    assert "made by DeepFusion of one dense base" in cards["moe/untaught"]
    assert "| steps | 0 |" in cards["moe/control"]


@pytest.mark.parametrize(
    ("trunk_share", "base"),
    [(1.0, "A copy of the trunk"), (0.5, "starting from the trunk"), (0.0, "from proxy 0")],
)
def test_a_base_tells_who_taught_it(
    trunk_share: float, base: str, zoo: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    for number in range(2):
        shutil.copytree(zoo["mini-gpt2"], tmp_path / "proxies" / str(number))
    steps = {"steps": 4, "batch_size": 2, "trunk_share": trunk_share, "alpha": 0.0}
    values = overlay(settings, distill=steps, data={"public_fraction": 0.1})
    distill.run(parse_config(values), {"proxies": tmp_path / "proxies"}, tmp_path)
    text = (tmp_path / "bases" / "0" / "README.md").read_text("utf-8")
    assert base in text
    assert ("the trunk" in text) == (trunk_share > 0)
    if trunk_share:
        trunk = (tmp_path / "bases" / "trunk" / "README.md").read_text("utf-8")
        assert "from all proxies: every base starts from it" in trunk
