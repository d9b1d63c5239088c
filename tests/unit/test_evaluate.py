"""Stage evaluate: the MoE beside its references, on the right domains, resumable, and content with what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from device_models import entry, grouped, save_adapter_upload, save_checkpoint, save_tokenizer, save_upload
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from deepfusion.config import parse_config
from deepfusion.jobs import close_pool
from deepfusion.learning.metrics import evaluate_model
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.records import Registry
from deepfusion.schema import Config
from deepfusion.stages.evaluate import run
from deepfusion.text.rows import Document
from deepfusion.text.sources import write_jsonl
from deepfusion.text.splits import make_splits

DEVICES = ("d00", "d01", "d02", "d03")
DOMAINS = {"animals": ("cat", "dog", "hill"), "numbers": ("one", "two", "three")}


def _save_moe(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=288, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=2,
        max_position_embeddings=128,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One file of documents per domain."""
    paths = []
    for domain, words in DOMAINS.items():
        documents = [
            Document(f"Item {i}:", f" {words[i % 3]} and {words[i % 2]} {i}", domain) for i in range(60)
        ]
        write_jsonl(documents, tmp_path / f"{domain}.jsonl")
        paths.append(tmp_path / f"{domain}.jsonl")
    return paths


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """All that the stage reads: d00 and d01 are one cluster, d02 and d03 the other."""
    run_folder = tmp_path / "run"
    for i, device in enumerate(DEVICES[:3]):
        save_upload(run_folder / "uploads" / device, "gpt2" if i < 2 else "llama", seed=i)
    save_checkpoint(tmp_path / "base-of-d03", "llama", seed=9)
    save_adapter_upload(run_folder / "uploads" / "d03", tmp_path / "base-of-d03", seed=4)
    for number, kind in enumerate(("gpt2", "llama")):
        save_checkpoint(run_folder / "proxies" / str(number), kind, seed=20 + number)
    for seed, name in enumerate(("moe", "control", "base")):
        _save_moe(run_folder / name, seed)
    types = ["gpt2", "gpt2", "llama", "llama"]
    registry = Registry([entry(device, type=kind) for device, kind in zip(DEVICES, types, strict=True)])
    registry.write(run_folder / "registry.json")
    clusters = grouped(list(DEVICES[:2]), list(DEVICES[2:]), types=("gpt2", "llama"))
    clusters.write(run_folder / "clusters.json")
    paths = {name: run_folder / name for name in ("moe", "control", "base", "uploads", "proxies")}
    return paths | {"registry": run_folder / "registry.json", "clusters": run_folder / "clusters.json"}


def _config(files: list[Path], **changes: Any) -> Config:
    devices = [{"id": device, "type": "gpt2", "data": str(files[i // 2])} for i, device in enumerate(DEVICES)]
    values = {"jobs": 1, "precision": "fp32", "experts": 2, "devices": devices, "data": {"test": 0.2}}
    return parse_config(values | changes)


def _evaluation(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    run(config, inputs, out)
    return json.loads((out / "evaluation.json").read_text())


def test_every_model_is_measured_where_it_should(
    inputs: dict[str, Path], files: list[Path], tmp_path: Path
) -> None:
    config = _config(files)
    found = _evaluation(config, inputs, tmp_path / "out")
    references = found["references"]
    test = make_splits(config).test
    for name, values in (
        ("moe", found["moe"]),
        ("control", references["no_distillation"]),
        ("base", references["base"]),
    ):
        expected = evaluate_model(load_model(inputs[name]), load_tokenizer(inputs[name]), test)
        assert values == json.loads(json.dumps(expected))
    assert set(references["devices"]) == set(DOMAINS)
    assert references["devices"]["animals"]["device"] in DEVICES[:2]
    assert references["devices"]["numbers"]["device"] in DEVICES[2:]
    assert list(references["proxies"]["0"]["by_domain"]) == ["animals"]
    assert references["proxies"]["1"]["domain"] == "numbers"
    use = found["expert_use"]
    assert set(use) == set(DOMAINS)
    assert [sum(layer) for layer in use["animals"]] == pytest.approx([1, 1])


def test_best_device_and_members_are_the_best(
    inputs: dict[str, Path], files: list[Path], tmp_path: Path
) -> None:
    config = _config(files)
    found = _evaluation(config, inputs, tmp_path / "out")
    test = [document for document in make_splits(config).test if document.domain == "animals"]
    own = {
        device: evaluate_model(
            load_model(inputs["uploads"] / device), load_tokenizer(inputs["uploads"] / device), test
        )
        for device in DEVICES[:2]
    }
    best = min(own, key=lambda device: own[device]["bits_per_byte"])
    assert found["references"]["devices"]["animals"]["device"] == best
    row = found["proxy_against_members"][0]
    assert (row["cluster"], row["domain"]) == (0, "animals")
    assert row["best_member"] == pytest.approx(min(values["log_perplexity"] for values in own.values()))
    assert row["difference"] == pytest.approx(row["proxy"] - row["best_member"])


def test_comparison_is_taken_over_domains(inputs: dict[str, Path], files: list[Path], tmp_path: Path) -> None:
    found = _evaluation(_config(files), inputs, tmp_path / "out")
    moe, comparison = found["moe"], found["comparison"]
    difference = (
        moe["mean_over_domains"]["log_perplexity"]
        - found["references"]["base"]["mean_over_domains"]["log_perplexity"]
    )
    assert comparison["moe_minus_base"]["log_perplexity"] == pytest.approx(difference)
    proxies = [proxy["bits_per_byte"] for proxy in found["references"]["proxies"].values()]
    ratio = moe["mean_over_domains"]["bits_per_byte"] / (sum(proxies) / 2)
    assert comparison["bits_per_byte_ratio_to_proxies"] == pytest.approx(ratio)


def test_adapter_is_measured_on_the_base_of_its_card(
    tmp_path: Path, files: list[Path], inputs: dict[str, Path]
) -> None:
    base = tmp_path / "base-of-d03"
    shutil.rmtree(inputs["uploads"] / "d03")
    meant = save_adapter_upload(inputs["uploads"] / "d03", base, seed=4)
    only = {"registry": tmp_path / "one.json", "uploads": inputs["uploads"]}
    Registry([entry("d03", type="llama")]).write(only["registry"])
    config = _config(files)
    found = _evaluation(config, only, tmp_path / "out")["references"]["devices"]["numbers"]
    test = [document for document in make_splits(config).test if document.domain == "numbers"]
    expected = evaluate_model(meant, load_tokenizer(base), test)
    assert found["log_perplexity"] == pytest.approx(expected["log_perplexity"], rel=1e-4)


def test_killed_stage_continues_from_finished_units(
    inputs: dict[str, Path], files: list[Path], tmp_path: Path
) -> None:
    whole = _evaluation(_config(files), inputs, tmp_path / "out")
    (tmp_path / "out" / "evaluation.json").unlink()
    units = tmp_path / "out" / "units"
    (units / "control" / "measured.json").unlink()
    # Were these measured again, the stage would fail.
    for name in ("moe", "base"):
        (inputs[name] / "config.json").write_text("broken")
    assert _evaluation(_config(files), inputs, tmp_path / "out") == whole


@pytest.mark.slow
def test_worker_processes_change_nothing(inputs: dict[str, Path], files: list[Path], tmp_path: Path) -> None:
    one = _evaluation(_config(files), inputs, tmp_path / "one")
    two = _evaluation(_config(files, jobs=2), inputs, tmp_path / "two")
    close_pool()
    assert one == two


def test_uploads_from_elsewhere_are_tried_on_every_domain(
    inputs: dict[str, Path], files: list[Path], tmp_path: Path
) -> None:
    test = [
        Document("", f"{word} and more {i}", domain)
        for domain, words in DOMAINS.items()
        for i, word in enumerate(words)
    ]
    write_jsonl(test, tmp_path / "test.jsonl")
    config = parse_config({"jobs": 1, "precision": "fp32", "data": {"test": str(tmp_path / "test.jsonl")}})
    found = _evaluation(config, inputs, tmp_path / "out")
    assert found["moe"]["examples"] == len(test)
    assert set(found["references"]["devices"]) == set(DOMAINS)
    for proxy in found["references"]["proxies"].values():
        assert set(proxy["by_domain"]) == set(DOMAINS)
        assert proxy["by_domain"][proxy["domain"]]["bits_per_byte"] == min(
            v["bits_per_byte"] for v in proxy["by_domain"].values()
        )


def test_absent_inputs_are_null(inputs: dict[str, Path], files: list[Path], tmp_path: Path) -> None:
    found = _evaluation(_config(files), {"moe": inputs["moe"]}, tmp_path / "out")
    assert found["moe"]["tokens"] > 0
    assert found["references"] == dict.fromkeys(("base", "no_distillation", "devices", "proxies"))
    assert found["proxy_against_members"] is None
    assert set(found["comparison"].values()) == {None}
    nothing = _evaluation(parse_config({"jobs": 1}), inputs, tmp_path / "no-test")
    assert nothing["moe"] is None
    assert nothing["expert_use"] is None


def test_cap_takes_documents_of_every_domain(
    inputs: dict[str, Path], files: list[Path], tmp_path: Path
) -> None:
    config = _config(files, evaluate={"max_documents": 3})
    found = _evaluation(config, {"moe": inputs["moe"]}, tmp_path / "out")
    assert {
        domain: values["examples"] for domain, values in found["moe"]["by_domain"].items()
    } == dict.fromkeys(DOMAINS, 3)
    again = _evaluation(config, {"moe": inputs["moe"]}, tmp_path / "again")
    assert again == found


def test_the_log_calls_devices_by_their_ids(
    inputs: dict[str, Path], files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where devices were set aside a place in the registry is no id; a device is named with its own domain."""
    registry = json.loads(inputs["registry"].read_text())
    inputs["registry"].write_text(json.dumps([registry[3], registry[1]]))
    grouped(["d01"], ["d03"], types=("gpt2", "llama")).write(inputs["clusters"])
    run(_config(files), inputs, tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[evaluate device ")]
    assert sorted((line.split("]")[0], line.rpartition(" on ")[2]) for line in lines) == [
        ("[evaluate device d01", "animals"), ("[evaluate device d03", "numbers"),
    ]  # fmt: skip
    measured = {path.parent.name for path in (tmp_path / "out" / "units" / "device").rglob("*.json")}
    assert measured == {"d01", "d03"}


def test_an_id_may_be_as_long_as_a_file_name(
    inputs: dict[str, Path], files: list[Path], tmp_path: Path
) -> None:
    name = "模" * 63
    shutil.move(inputs["uploads"] / "d00", inputs["uploads"] / name)
    only = {"registry": tmp_path / "one.json", "uploads": inputs["uploads"]}
    Registry([entry(name, type="gpt2")]).write(only["registry"])
    found = _evaluation(_config(files), only, tmp_path / "out")["references"]["devices"]
    assert {row["device"] for row in found.values()} == {name}


def test_the_summary_names_its_mean(inputs: dict[str, Path], files: list[Path], tmp_path: Path) -> None:
    summary = run(_config(files), {"moe": inputs["moe"]}, tmp_path / "out")
    moe = json.loads((tmp_path / "out" / "evaluation.json").read_text())["moe"]
    assert summary["moe"] == {"mean_over_domains": moe["mean_over_domains"]}
