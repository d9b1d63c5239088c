"""The server side alone: uploads of real devices, checkpoints that nobody prepared, and uploads that are unsound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from conftest import overlay, save_checkpoint, small_settings, write_config
from deepfusion.names import device_id

SMALL = {
    "data": {"public": ["sampled"], "sampled_documents": 4, "max_chars": 96},
    "distill": {"steps": 4},
    "tune": {"steps": 2},
}


@pytest.fixture
def uploads(zoo, tmp_path, invoke) -> Path:
    """Three uploads made by `deepfusion device train`: an adapter and two compact ones."""
    settings = small_settings(zoo, tmp_path)
    config = write_config(
        tmp_path / "device.yaml", {"device": {"steps": 4, "batch_size": 4}, "data": {"max_chars": 96}}
    )
    choices = (("ward", "upload=delta8"), ("clinic", "method=lora"), ("bank", "upload=delta4"))
    for device, (name, choice) in zip(settings["devices"], choices, strict=False):
        done = invoke(
            "device", "train", config, "--data", device["data"], "--out", tmp_path / "uploads" / name,
            "--type", device["type"],
            "--set", f"device.{choice}", "--set", f"seed={len(name)}", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert json.loads(done.out)["loss_after"] > 0
        done = invoke("device", "check", tmp_path / "uploads" / name, "--json")
        assert (done.code, json.loads(done.out)) == (0, {"ok": True, "errors": []}), done.err
    return tmp_path / "uploads"


def fuse_config(zoo: dict[str, Path], tmp_path: Path, **changes: object) -> Path:
    values = overlay(
        SMALL,
        family="qwen3_moe",
        experts=2,
        jobs=1,
        precision="fp32",
        distill={"base": str(zoo["qwen3_moe"])},
    )
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
        save_checkpoint(
            given / name,
            AutoConfig.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
            seed=number,
        )
    shutil.copytree(zoo["mini-llama"], given / "third")
    (given / "notes.txt").write_text("not a checkpoint")
    small = [f"--set={key}" for key in (
        f"distill.base={zoo['qwen3_moe']}", "distill.steps=6", "tune.steps=2", "data.sampled_documents=4",
        "data.max_chars=96",
        "jobs=1", "precision=fp32",
    )]  # fmt: skip
    done = invoke("fuse", given, "--out", tmp_path / "run", *small, "--json")
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(json.loads(done.out)["checkpoint"])
    assert model.config.num_experts == 3
    registry = json.loads((tmp_path / "run" / "registry.json").read_text("utf-8"))
    assert [entry["device"] for entry in registry] == [device_id("my model"), "second.model", "third"]


def save_model(folder: Path, like: Path, seed: int, **changes: object) -> None:
    config = AutoConfig.from_pretrained(like)
    config.update(changes)
    save_checkpoint(folder, config, AutoTokenizer.from_pretrained(like), seed=seed)


def save_adapter(folder: Path, base: Path, named: str) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(folder)
    values = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": named}))


NAMES = ("模型一", "模型二", "my model (v1)", "my model [v1]", "x" * 64, "x" * 65, "...")
FAST = ("--set", "device.embedding_size=16", "--set", "jobs=1", "--set", "precision=fp32")


def test_every_model_in_comes_out_or_is_named_with_its_reason(zoo, tmp_path, invoke):
    given, run = tmp_path / "given", tmp_path / "run"
    for number, name in enumerate(NAMES):
        save_model(given / name, zoo["mini-llama"], number)
    save_model(given / "largest", zoo["mini-llama"], 8, hidden_size=24)
    save_adapter(given / "tuned", given / "模型一", "模型一")
    save_model(given / "broken", zoo["mini-llama"], 9)
    weights = given / "broken" / "model.safetensors"
    save_file(
        {name: tensor / 0 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"}
    )
    save_model(given / "classifier", zoo["mini-llama"], 10)
    AutoModelForSequenceClassification.from_pretrained(given / "classifier").save_pretrained(
        given / "classifier"
    )
    (given / "notes.txt").write_text("")
    (given / "data").mkdir()
    done = invoke("fuse", given, "--out", run, *FAST, "--until", "cluster", "--json")
    assert done.code == 0, done.err
    registry = {entry["device"] for entry in json.loads((run / "registry.json").read_text("utf-8"))}
    rejected = json.loads((run / "rejected.json").read_text("utf-8"))
    assert {name: problems[0]["code"] for name, problems in rejected.items()} == {
        "broken": "non-finite", "classifier": "not-a-language-model",
    }  # fmt: skip
    assert len(registry) == len(NAMES) + 2
    assert {"模型一", "模型二", "largest", "tuned"} < registry
    assert "left out: data (no config.json), notes.txt (not a folder)" in done.err
    settings = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    assert (settings["family"], settings["experts"], settings["top_k"]) == ("deepseek", 8, 2)
    assert settings["distill"]["base"] == str(run / "uploads" / "largest")
    told = done.err.splitlines()
    assert any(
        line.startswith("base largest: ") and "MoE of 8 experts: " in line and "active per token" in line
        for line in told
    )
    assert any(line.startswith("models: ") and "8 llama (" in line and "1 llama (" in line for line in told)


def test_experts_are_counted_when_it_is_known_who_is_sound(zoo, tmp_path, invoke):
    given = tmp_path / "given"
    for number, folder in enumerate(("m0", "m1", "m2/checkpoint-7")):
        save_model(given / folder, zoo["mini-llama"], number)
    shutil.copytree(given / "m0", given / "twin")
    (given / "torn").mkdir()
    (given / "torn" / "config.json").write_text("{}")
    done = invoke("fuse", given, "--out", tmp_path / "run", *FAST, "--until", "cluster")
    assert done.code == 0, done.err
    clusters = json.loads((tmp_path / "run" / "clusters.json").read_text("utf-8"))
    assert (clusters["experts"], len(clusters["clusters"])) == (3, 3)
    assert "[device m2] sampled 64/64 texts" in done.err, "not by the name of its folder, checkpoint-7"
    before, _, after = done.err.partition("[registry] ")
    assert "recipe fused, 5 models given, run folder " in before
    assert "\nif all are sound: base " in before
    assert "\nif all are sound: models: 4 llama (" in before, "the fifth cannot be read"
    assert "\nbase " not in before
    assert "\nmodels: 3 llama (" in after
    done = invoke("fuse", given, "--out", tmp_path / "run", *FAST, "--set", "experts=5", "--until", "cluster")
    line = done.err.splitlines()[-1]
    assert done.code == 2
    assert "3 sound models are fewer than experts=5; set aside: " in line
    assert "torn: " in line
    assert "twin: the same weights as the upload of m0 [duplicate-weights]" in line


def test_what_cannot_be_fused_is_refused_before_any_work(zoo, tmp_path, invoke):
    given = tmp_path / "given"
    save_model(given / "one", zoo["mini-llama"], 0)
    save_adapter(given / "tuned", given / "one", "somebody/else")
    for arguments, place in (
        ((given,), "needs its base somebody/else"),
        ((given / "one",), f"give the folder that holds it: {given}"),
    ):
        done = invoke("fuse", *arguments, "--out", tmp_path / "run", *FAST)
        assert (done.code, done.out) == (2, "")
        assert place in done.err.splitlines()[-1]
        assert not (tmp_path / "run").exists()
    shutil.rmtree(given / "tuned")
    save_model(given / "gpt2", zoo["mini-gpt2"], 1, n_embd=1024)
    done = invoke("fuse", given, "--out", tmp_path / "run", *FAST, "--set", "family=qwen3_moe")
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("[base-too-small]")
    assert not (tmp_path / "run").exists()
    shutil.rmtree(given / "gpt2")
    done = invoke("fuse", given, "--out", tmp_path / "new" / "run", *FAST, "--set", "top_k=9")
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("[layout-top-k]")
    assert not (tmp_path / "new").exists()


def test_plan(zoo, settings, invoke):
    types = [f"--type={zoo[name]}" for name in ("mini-gpt2", "mini-llama")]
    done = invoke(
        "device", "plan", "--memory", "4GB", "--text", settings["devices"][2]["data"], *types, "--json"
    )
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
        {
            "device": {"steps": 2, "types": [str(zoo["mini-llama"]), str(zoo["mini-bloom"])]},
            "data": {"max_chars": 96},
        },
    )
    data = settings["devices"][2]["data"]
    done = invoke(
        "device", "train", config, "--data", data, "--out", tmp_path / "My Phone", "--memory", "8GB"
    )
    assert done.code == 0, done.err
    card = json.loads((tmp_path / "My Phone" / "card.json").read_text("utf-8"))
    assert card["device"] == device_id("My Phone")
    assert card["type"] in ("mini-llama", "mini-bloom")
