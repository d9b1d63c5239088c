"""The server side alone: uploads of real devices, checkpoints that nobody prepared, and uploads that are unsound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import overlay, save_checkpoint, small_settings, write_config

SMALL = {"data": {"public": ["sampled"], "sampled_documents": 4, "max_chars": 96}, "distill": {"steps": 4}, "tune": {"steps": 2}}


@pytest.fixture
def uploads(zoo, tmp_path, invoke) -> Path:
    """Three uploads made by `deepfusion device train`: an adapter and two compact ones."""
    settings = small_settings(zoo, tmp_path)
    config = write_config(tmp_path / "device.yaml", {"device": {"steps": 4, "batch_size": 4}, "data": {"max_chars": 96}})
    choices = (("ward", "upload=delta8"), ("clinic", "method=lora"), ("bank", "upload=delta4"))
    for device, (name, choice) in zip(settings["devices"], choices, strict=False):
        done = invoke(
            "device", "train", config, "--data", device["data"], "--out", tmp_path / "uploads" / name, "--type", device["type"],
            "--set", f"device.{choice}", "--set", f"seed={len(name)}", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert json.loads(done.out)["loss_after"] > 0
        done = invoke("device", "check", tmp_path / "uploads" / name, "--json")
        assert (done.code, json.loads(done.out)) == (0, {"ok": True, "errors": []}), done.err
    return tmp_path / "uploads"


def fuse_config(zoo: dict[str, Path], tmp_path: Path, **changes: object) -> Path:
    values = overlay(SMALL, family="qwen3_moe", experts=2, jobs=1, precision="fp32", distill={"base": str(zoo["qwen3_moe"])})
    values = overlay(values, device={"types": [str(zoo["mini-gpt2"]), str(zoo["mini-llama"])]}, **changes)
    return write_config(tmp_path / "fuse.yaml", values)


def test_train_check_fuse(uploads, zoo, tmp_path, invoke):
    done = invoke("fuse", uploads, fuse_config(zoo, tmp_path), "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    outcome = json.loads(done.out)
    AutoModelForCausalLM.from_pretrained(outcome["checkpoint"])
    assert outcome["evaluation"]["moe"] is None  # nobody gave test text
    assert json.loads((tmp_path / "run" / "rejected.json").read_text("utf-8")) == {}
    clusters = json.loads((tmp_path / "run" / "clusters.json").read_text("utf-8"))["clusters"]
    assert sorted(map(sorted, (c["devices"] for c in clusters))) == [["bank"], ["clinic", "ward"]]
    transport = json.loads((tmp_path / "run" / "transport.json").read_text("utf-8"))
    assert set(transport["devices"]) == {"bank", "clinic", "ward"}
    registry = json.loads((tmp_path / "run" / "registry.json").read_text("utf-8"))
    assert [entry["encoding"] for entry in registry] == ["delta4", "weights", "delta8"]


def test_one_trunk_learns_from_more_proxies_than_there_are_experts(uploads, zoo, tmp_path, invoke):
    settings = fuse_config(zoo, tmp_path, clustering={"proxies": 9})
    done = invoke("fuse", uploads, settings, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert AutoModelForCausalLM.from_pretrained(json.loads(done.out)["checkpoint"]).config.num_experts == 2
    assert {path.name for path in (tmp_path / "run" / "proxies").iterdir()} == {"0", "1", "2"}
    corpus = (tmp_path / "run" / "bases" / "corpus.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["teacher"] for line in corpus} == {0, 1, 2}


def test_unsound_uploads_are_set_aside_and_the_run_goes_on(uploads, zoo, tmp_path, invoke):
    shutil.copytree(uploads / "bank", uploads / "torn")
    weights = uploads / "torn" / "delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(uploads / "bank", uploads / "twin")
    (uploads / "odd").mkdir()
    (uploads / "odd" / "card.json").write_text("{}")
    (uploads / "odd" / "link").symlink_to("/etc/passwd")
    done = invoke("device", "check", uploads / "torn", "--json")
    assert done.code == 2
    report = json.loads(done.out)
    assert report["ok"] is False
    assert all(set(error) >= {"code", "message", "file"} for error in report["errors"])
    done = invoke("fuse", uploads, fuse_config(zoo, tmp_path), "--out", tmp_path / "run", "--until", "proxy")
    assert done.code == 0, done.err
    rejected = json.loads((tmp_path / "run" / "rejected.json").read_text("utf-8"))
    assert set(rejected) == {"odd", "torn", "twin"}
    registry = json.loads((tmp_path / "run" / "registry.json").read_text("utf-8"))
    assert [entry["device"] for entry in registry] == ["bank", "clinic", "ward"]


def test_only_unsound_uploads(uploads, zoo, tmp_path, invoke):
    for folder in uploads.glob("[a-z]*"):
        (folder / "card.json").write_text("{}")
    done = invoke("fuse", uploads, fuse_config(zoo, tmp_path), "--out", tmp_path / "run")
    assert done.code == 2
    assert "no sound upload" in done.err.splitlines()[-1]


def test_plain_checkpoints_without_any_text(zoo, tmp_path, invoke):
    """Models as they lie on a hub: no cards, names with spaces, two types; no config but where the base is."""
    given = tmp_path / "checkpoints"
    for number, name in enumerate(("my model", "second.model")):
        folder = zoo["mini-gpt2"]
        save_checkpoint(given / name, AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), seed=number)
    shutil.copytree(zoo["mini-llama"], given / "third")
    (given / "notes.txt").write_text("not a checkpoint")
    small = [f"--set={key}" for key in (
        f"distill.base={zoo['qwen3_moe']}", "distill.steps=6", "tune.steps=2", "data.sampled_documents=4", "data.max_chars=96",
        "jobs=1", "precision=fp32",
    )]  # fmt: skip
    done = invoke("fuse", given, "--out", tmp_path / "run", *small, "--json")
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(json.loads(done.out)["checkpoint"])
    assert model.config.num_experts == 3
    registry = json.loads((tmp_path / "run" / "registry.json").read_text("utf-8"))
    assert [entry["device"] for entry in registry] == ["my-model", "second.model", "third"]


def test_plan(zoo, settings, invoke):
    types = [f"--type={zoo[name]}" for name in ("mini-gpt2", "mini-llama")]
    done = invoke("device", "plan", "--memory", "4GB", "--text", settings["devices"][2]["data"], *types, "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["budget_bytes"] == 4 * 10**9
    assert plan["chosen"] == plan["fits"][0]
    assert all(set(fit) >= {"type", "method", "estimated_bytes"} for fit in plan["fits"])
    assert all(fit["estimated_bytes"] <= plan["budget_bytes"] for fit in plan["fits"])
    done = invoke("device", "plan", "--memory", "1MB", *types, "--json")
    assert (done.code, json.loads(done.out)) == (0, {"budget_bytes": 10**6, "fits": [], "chosen": None})


def test_the_largest_type_that_fits_is_trained(zoo, settings, tmp_path, invoke):
    config = write_config(
        tmp_path / "device.yaml",
        {"device": {"steps": 2, "types": [str(zoo["mini-llama"]), str(zoo["mini-bloom"])]}, "data": {"max_chars": 96}},
    )
    data = settings["devices"][2]["data"]
    done = invoke("device", "train", config, "--data", data, "--out", tmp_path / "My Phone", "--memory", "8GB")
    assert done.code == 0, done.err
    card = json.loads((tmp_path / "My Phone" / "card.json").read_text("utf-8"))
    assert card["device"] == "My-Phone"
    assert card["type"] in ("mini-llama", "mini-bloom")
