"""The command line without a run: help, configs, explanations, and JSON that stands alone on stdout."""

from __future__ import annotations

import json

import pytest
import yaml

from conftest import write_config
from deepfusion.config import known_keys, load_config, parse_config
from deepfusion.models.presets import PRESETS

COMMANDS = [
    "run", "fuse", "status", "report", "doctor", "evaluate", "generate",
    "device plan", "device train", "device check", "config show", "config check", "config explain",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, invoke):
    done = invoke(*name.split(), "--help")
    assert done.code == 0
    assert f"deepfusion {name}" in done.out
    assert done.err == ""


def test_show_prints_a_config_that_can_be_read_again(tmp_path, invoke):
    done = invoke("config", "show", "--set", "seed=5")
    assert done.code == 0
    (tmp_path / "shown.yaml").write_text(done.out, "utf-8")
    assert load_config(tmp_path / "shown.yaml") == load_config(overrides=["seed=5"])
    as_json = json.loads(invoke("config", "show", "--set", "seed=5", "--json").out)
    assert parse_config(as_json) == load_config(overrides=["seed=5"])


def test_explain_knows_every_key(invoke):
    rows = json.loads(invoke("config", "explain", "--json").out)
    assert list(rows) == known_keys()
    assert all(set(row) == {"type", "default", "meaning"} for row in rows.values())
    section = invoke("config", "explain", "distill.vaa")
    assert "distill.vaa.patches" in section.out
    assert "distill.steps" not in section.out
    assert "tune.steps" in invoke("config", "explain", "tune.steps").out


def test_check_counts_documents(settings, tmp_path, invoke):
    done = invoke("config", "check", write_config(tmp_path / "config.yaml", settings), "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["ok"] is True
    assert set(facts["devices"]) == {"ward", "clinic", "bank", "fund"}
    assert (
        sum(device["documents"] for device in facts["devices"].values())
        + facts["public_documents"]
        + facts["test_documents"]
        <= 88
    )
    done = invoke("config", "check", write_config(tmp_path / "config.yaml", settings))
    assert yaml.safe_load(done.out) == facts


def test_check_refuses_what_run_would_refuse(settings, tmp_path, invoke):
    done = invoke(
        "config", "check", write_config(tmp_path / "config.yaml", settings), "--set", "family=deepseek"
    )
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("deepfusion: ")


def test_doctor(invoke):
    facts = json.loads(invoke("doctor", "--json").out)
    assert {"deepfusion", "python", "packages", "cores", "memory_bytes", "missing"} <= set(facts)
    assert "torch" in invoke("doctor").out


def test_plan_of_all_presets_needs_no_network(invoke):
    done = invoke("device", "plan", "--memory", "40GB", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert {fit["type"] for fit in plan["fits"]} <= set(PRESETS)
    assert {"gpt2", "tinyllama"} <= {fit["type"] for fit in plan["fits"]}
    table = invoke("device", "plan", "--memory", "2GB")
    assert "chosen: " in table.out


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        ("server start --embedded --public fusion.example.org", "bad-usage", "--public"),
        ("server start --embedded --stay", "bad-usage", "--stay"),
        ("server start --embedded --set federation.wait_for=3", "contradiction", "waits for all 4 devices"),
        ("device join --server a:1 --upload u --type gpt2", "bad-usage", "--type"),
        ("device join --server a:1 --upload u --memory 4GB", "bad-usage", "--memory"),
        (
            "config check --set recipe=paper --set clustering.proxies=16",
            "contradiction",
            "--set recipe=paper",
        ),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(line, code, word, settings, tmp_path, invoke):
    config = write_config(tmp_path / "config.yaml", settings)
    given = [config, "--out", tmp_path / "run"] if line.startswith("server") else []
    done = invoke(*line.split(), *given)
    told = done.err.splitlines()[-1]
    assert (done.code, done.out) == (2, "")
    assert told.startswith("deepfusion: ")
    assert f"[{code}]" in told
    assert word in told
