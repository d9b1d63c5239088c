"""Phase III: what is tuned and what stays, the control beside it, and a finished half that is not made again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import digests, overlay, sentences, write_config
from deepfusion.config import load_config
from deepfusion.families.base import is_expert_name
from deepfusion.learning.corpus import Window, write_corpus
from deepfusion.schema import Config
from deepfusion.stages import tune
from deepfusion.stages.merge import write_moe
from deepfusion.text.rows import Document

# A Qwen2Moe without shared experts has empty weights, which torch remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def prepared(
    settings: dict[str, Any], zoo: dict[str, Path], folder: Path, family: str, **changes: Any
) -> Config:
    """The inputs of the stage below `folder`, and its config."""
    values = overlay(
        settings, family=family, experts=2, jobs=1,
        distill={"base": str(zoo[family])}, tune={"steps": 3, "teachers": False, **changes},
    )  # fmt: skip
    config = load_config(write_config(folder / "config.yaml", values))
    for name in ("merged", "untaught"):
        write_moe(config, [zoo[family]] * 2, False, folder / "moe" / name)
    rows = sentences("medicine", 6) + sentences("finance", 6)
    windows = [Window(Document("", row["text"], "d"), "public", n % 2) for n, row in enumerate(rows)]
    windows += [Window(Document("", "A dose of gold.", "sampled"), "sampled", 0)]
    (folder / "bases").mkdir()
    write_corpus(windows, folder / "bases" / "corpus.jsonl")
    for k in range(2):
        (folder / "proxies" / str(k)).parent.mkdir(exist_ok=True)
        (folder / "proxies" / str(k)).symlink_to(zoo["mini-llama"])
    return config


def run(config: Config, folder: Path, out: str = "out") -> dict[str, Any]:
    inputs = {name: folder / "moe" / name for name in ("merged", "untaught")}
    inputs |= {"bases": folder / "bases", "proxies": folder / "proxies", "run": folder}
    (folder / out).mkdir(exist_ok=True)
    return tune.run(config, inputs, folder / out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("train_experts", [True, False])
def test_frozen_experts_stay_bit_by_bit_and_all_else_moves(settings, zoo, tmp_path, train_experts):
    config = prepared(settings, zoo, tmp_path, "qwen3_moe", train_experts=train_experts, control=False)
    found = run(config, tmp_path)
    assert set(found) == {"final"}
    before, after = weights(tmp_path / "moe" / "merged"), weights(tmp_path / "out" / "moe" / "final")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    experts = {name for name in before if is_expert_name(name)}
    assert bool(moved & experts) == train_experts
    assert moved - experts
    assert not (tmp_path / "out" / "moe" / "control").exists()


def test_what_is_no_part_of_the_architecture_is_never_trained(settings, zoo, tmp_path):
    config = prepared(settings, zoo, tmp_path, "deepseek", train_experts=True, control=False)
    run(config, tmp_path)
    after = weights(tmp_path / "out" / "moe" / "final")
    gates = [tensor for name, tensor in after.items() if name.endswith("shared_expert_gate.weight")]
    assert gates
    assert not any(gate.any() for gate in gates)


def test_the_control_never_reads_what_proxies_wrote(settings, zoo, tmp_path):
    config = prepared(settings, zoo, tmp_path, "qwen3_moe")
    run(config, tmp_path)
    with_samples = digests(tmp_path / "out", "moe/control")
    corpus = tmp_path / "bases" / "corpus.jsonl"
    lines = corpus.read_text("utf-8").splitlines(keepends=True)
    corpus.write_text("".join(line for line in lines if "sampled" not in line), "utf-8")
    run(config, tmp_path, "again")
    assert digests(tmp_path / "again", "moe/control") == with_samples
    assert "no device taught it" in (tmp_path / "out" / "moe" / "control" / "README.md").read_text("utf-8")


def test_where_there_are_only_samples_the_control_stays_untuned(settings, zoo, tmp_path):
    config = prepared(settings, zoo, tmp_path, "qwen3_moe")
    write_corpus(
        [Window(Document("", "Gold pays now.", "s"), "sampled", 0)] * 4, tmp_path / "bases" / "corpus.jsonl"
    )
    run(config, tmp_path)
    start, control = weights(tmp_path / "moe" / "untaught"), weights(tmp_path / "out" / "moe" / "control")
    assert all(torch.equal(start[name], control[name]) for name in start)


def test_a_half_that_is_finished_is_not_made_again(settings, zoo, tmp_path):
    config = prepared(settings, zoo, tmp_path, "qwen3_moe", teachers=True)
    run(config, tmp_path)
    before = digests(tmp_path / "out", "moe")
    shutil.rmtree(tmp_path / "out" / "moe" / "control")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "moe" / "final").iterdir()}
    run(config, tmp_path)
    again = digests(tmp_path / "out", "moe")
    assert {name: again[name] for name in before if "README" not in name} == {
        name: digest for name, digest in before.items() if "README" not in name
    }
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name != "README.md")
