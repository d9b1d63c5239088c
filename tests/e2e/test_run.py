"""A whole run through the real command line: what it leaves behind, and what a second run does with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import digests, overlay, run_settings, sentences, small_settings, write_config, write_rows
from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.learning.corpus import read_corpus
from deepfusion.pipeline import NAMES, status
from deepfusion.text.splits import make_splits

METRICS = {
    "log_perplexity", "perplexity", "bits_per_byte", "token_accuracy", "choice_accuracy", "tokens", "examples",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(zoo, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def values(zoo, home) -> dict[str, Any]:
    """Five devices, three types with tokenizers of their own, three domains, one LoRA device."""
    settings = small_settings(zoo, home)
    cooking = write_rows(home / "cooking.jsonl", sentences("cooking", 20))
    cook = {"id": "cook", "type": str(zoo["mini-bloom"]), "data": str(cooking), "method": "lora"}
    return overlay(
        settings,
        experts=3,
        devices=[*settings["devices"], cook],
        data={"public": ["in_domain", "sampled"]},
        distill={"alpha": 0.1},
    )


@pytest.fixture(scope="module")
def outcome(home, values, command) -> dict[str, Any]:
    """What `deepfusion run --json` prints; the run folder is `home / "run"`."""
    done = command("run", write_config(home / "config.yaml", values), "--out", home / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert "it/s]" not in done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(home, outcome) -> Path:
    return home / "run"


@pytest.fixture
def mine(run, tmp_path) -> Path:
    """The run folder, for one test to change."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def redone(run: Path, act: Callable[[], object]) -> set[str]:
    """The stages that `act` does again."""
    before = len((run / "log.txt").read_text("utf-8"))
    act()
    lines = (run / "log.txt").read_text("utf-8")[before:].splitlines()
    return {name for name in NAMES if any(f" [{name}] done in " in line for line in lines)}


def test_every_artefact_is_there(run, values):
    for name in (
        "config.yaml",
        "manifest.json",
        "log.txt",
        "metrics.jsonl",
        "registry.json",
        "rejected.json",
    ):
        assert (run / name).is_file(), name
    for name in ("clusters.json", "transport.json", "evaluation.json", "report/index.html"):
        assert (run / name).is_file(), name
    assert any((run / "tensorboard").rglob("events*"))
    devices = {device["id"] for device in values["devices"]}
    assert {path.name for path in (run / "uploads").iterdir()} == devices
    for device in devices:
        kept = {path.name for path in (run / "uploads" / device).iterdir()}
        assert {"card.json", "config.json", "tokenizer.json"} <= kept
        assert ("adapter_model.safetensors" in kept) == (device == "cook")
        assert ("model.safetensors" in kept) == (device != "cook")
    for name in (
        "proxies/0",
        "proxies/1",
        "proxies/2",
        "bases/0",
        "bases/1",
        "bases/2",
        "moe/merged",
        "moe/final",
    ):
        kept = {path.name for path in (run / name).iterdir()}
        assert {"config.json", "tokenizer.json", "README.md", "model.safetensors"} <= kept, name
        assert any(
            line.startswith("# ") for line in (run / name / "README.md").read_text("utf-8").splitlines()
        )
    assert [path.name for path in (run / ".work").iterdir()] == []


def test_config_of_the_run_is_complete_and_reads_back(run, home):
    assert load_config(run / "config.yaml") == load_config(home / "config.yaml")


def test_manifest_says_what_was_done_where(run, home):
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    assert {"version", "git", "packages", "hardware", "seed", "argv"} <= set(manifest)
    assert list(manifest["stages"]) == list(NAMES)
    for entry in manifest["stages"].values():
        assert entry["status"] == "done"
        assert entry["seconds"] >= 0
        assert entry["peak_rss_bytes"] > 10**8
        assert all(len(digest) == 64 for digest in entry["digests"].values())


def test_status_json(run, invoke):
    done = invoke("status", run, "--json")
    assert done.code == 0, done.err
    state = json.loads(done.out)
    assert state["run"] == str(run)
    assert [stage["name"] for stage in state["stages"]] == list(NAMES)
    for stage in state["stages"]:
        assert set(stage) >= {"name", "status", "seconds", "peak_rss_bytes"}


def test_evaluation_json(run, outcome):
    found = json.loads((run / "evaluation.json").read_text("utf-8"))
    assert outcome["evaluation"] == found
    domains = {"medicine", "finance", "cooking"}
    for metrics in (found["moe"], found["references"]["base"], found["references"]["no_distillation"]):
        assert set(metrics) >= METRICS | {"by_domain"}
        assert set(metrics["by_domain"]) == domains
        assert all(set(row) >= METRICS for row in metrics["by_domain"].values())
    assert set(found["references"]["devices"]) == domains
    assert found["moe"]["by_domain"]["finance"]["choice_accuracy"] is None


def test_transport_counts_the_bytes_of_the_upload_folders(run):
    transport = json.loads((run / "transport.json").read_text("utf-8"))
    sizes = {f.name: sum(p.stat().st_size for p in f.iterdir()) for f in (run / "uploads").iterdir()}
    assert transport["devices"] == {name: {"up_bytes": size, "down_bytes": 0} for name, size in sizes.items()}
    assert transport["total_up_bytes"] == sum(sizes.values())
    assert transport["total_down_bytes"] == 0


def test_final_checkpoint_is_plain_transformers(run):
    model = AutoModelForCausalLM.from_pretrained(run / "moe" / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "moe" / "final")
    assert (model.config.model_type, model.config.num_experts, model.config.num_experts_per_tok) == (
        "qwen3_moe",
        3,
        2,
    )
    prompt = tokenizer("The patient", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert text.shape[1] == prompt.input_ids.shape[1] + 5


def test_generate_and_evaluate_commands(run, home, invoke):
    done = invoke("generate", run / "moe" / "final", "The bank", "--max-new-tokens", 4, "--json")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)) >= {"prompt", "completion", "tokens"}
    done = invoke(
        "evaluate", run / "moe" / "final", "--data", home / "medicine.jsonl", "--max-chars", 96, "--json"
    )
    assert done.code == 0, done.err
    metrics = json.loads(done.out)
    assert set(metrics) >= METRICS | {"by_domain"}
    assert 0 <= metrics["choice_accuracy"] <= 1


def test_status_and_report_for_people(mine, invoke):
    done = invoke("status", mine)
    assert done.code == 0
    assert all(name in done.out for name in NAMES)
    page = mine / "report" / "index.html"
    page.unlink()
    done = invoke("report", mine)
    assert done.code == 0, done.err
    assert str(page) in done.out.replace("\n", "")
    assert page.stat().st_size > 10_000


def test_uploads_hold_no_text_and_no_path(run, home):
    for card in (run / "uploads").glob("*/card.json"):
        text = card.read_text("utf-8")
        assert "patient" not in text
        assert str(home / "medicine.jsonl") not in text


def test_no_test_document_reaches_devices_or_corpus(run):
    splits = make_splits(load_config(run / "config.yaml"))
    test = {document.id for document in splits.test}
    assert len(test) > 10
    seen = [e for part in (*splits.private.values(), *splits.held_out.values(), splits.public) for e in part]
    assert test.isdisjoint(document.id for document in seen)
    corpus = "\n".join(document.document.text for document in read_corpus(run / "bases" / "corpus.jsonl"))
    assert not [document for document in splits.test if document.text in corpus]


def test_second_run_redoes_nothing(mine, values):
    before = digests(mine, "uploads", "proxies", "bases", "moe")
    assert redone(mine, lambda: run_settings(values, mine)) == {"report"}
    assert digests(mine, "uploads", "proxies", "bases", "moe") == before


def test_changed_tuning_redoes_only_what_follows(mine, values):
    before = digests(mine, "uploads", "proxies", "bases", "moe/merged")
    changed = overlay(values, tune={"steps": 2})
    assert redone(mine, lambda: run_settings(changed, mine)) == {"tune", "evaluate", "report"}
    assert digests(mine, "uploads", "proxies", "bases", "moe/merged") == before


def test_without_the_control_its_files_go_and_the_rest_stays(mine, values):
    final = digests(mine, "moe/final")
    without = overlay(values, tune={"control": False})
    changed = {"merge", "tune", "evaluate", "report"}
    assert redone(mine, lambda: run_settings(without, mine)) == changed
    assert not (mine / "moe" / "control").exists()
    assert not (mine / "moe" / "untaught").exists()
    assert json.loads((mine / "evaluation.json").read_text("utf-8"))["references"]["no_distillation"] is None
    assert digests(mine, "moe/final").keys() == final.keys()
    assert redone(mine, lambda: run_settings(without, mine)) == {"report"}
    assert redone(mine, lambda: run_settings(values, mine)) == changed
    assert (mine / "moe" / "control" / "config.json").is_file()
    assert digests(mine, "moe/final") == final


def test_a_lost_artefact_is_made_again_and_nothing_else(mine, values):
    before = digests(mine, "proxies", "moe")
    (mine / "clusters.json").unlink()
    assert redone(mine, lambda: run_settings(values, mine)) == {"cluster", "report"}
    assert digests(mine, "proxies", "moe") == before


def test_from_and_until_bound_the_stages(mine, values):
    before = digests(mine, "moe")
    assert redone(mine, lambda: run_settings(values, mine, first="cluster", last="merge")) == {
        "cluster", "proxy", "distill", "merge",
    }  # fmt: skip
    assert digests(mine, "moe") == before  # the same config and seed give the same weights
    states = {stage["name"]: stage["status"] for stage in status(mine)["stages"]}
    assert set(states.values()) == {"done"}


def test_other_data_is_refused_and_uploads_are_kept(mine, home, values, invoke):
    before = digests(mine, "uploads")
    changed = overlay(values, seed=5)
    done = invoke("run", write_config(home / "other.yaml", changed), "--out", mine)
    assert done.code == 2
    assert "another-run" in done.err
    rows = (home / "finance.jsonl").read_text("utf-8")
    try:
        write_rows(home / "finance.jsonl", sentences("finance", 30, seed=1))
        with pytest.raises(InputError, match="another-run"):
            run_settings(values, mine)
    finally:
        (home / "finance.jsonl").write_text(rows, "utf-8")
    assert digests(mine, "uploads") == before


def test_until_leaves_the_rest_waiting(settings, tmp_path):
    run_settings(settings, tmp_path / "run", last="cluster")
    states = {stage["name"]: stage["status"] for stage in status(tmp_path / "run")["stages"]}
    assert [name for name, state in states.items() if state == "done"] == ["device", "registry", "cluster"]
    assert {state for name, state in states.items() if name not in ("device", "registry", "cluster")} == {
        "waiting"
    }
    assert not (tmp_path / "run" / "proxies").exists()
