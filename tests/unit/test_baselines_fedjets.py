"""FedJETs: compact MoEs compute what their experts do in the global one, means are exact, and a killed run ends the
same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import digests, overlay, sentences, write_config, write_rows
from deepfusion import progress
from deepfusion.config import load_config, parse_config
from deepfusion.errors import InputError
from deepfusion.families.base import is_expert_name
from deepfusion.learning.corpus import Window
from deepfusion.schema import Config
from deepfusion.stages import merge
from deepfusion.text.rows import Document
from deepfusion_bench.baselines import fedjets
from deepfusion_bench.baselines.fedjets import (
    FedJETS,
    aggregate,
    compact_model,
    draft,
    load_compact,
    preferences,
    run,
    tensors_of,
    wire_bytes,
)

# A Qwen2Moe without shared experts has empty weights, which torch remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

BASES = 4
DEEPSEEK = {"shared_expert": "average", "split": 2, "dense_layers": [0]}


def fuse(base: Path, family: str, out: Path, top_k: int = 2, **options: Any) -> Path:
    """A global MoE of four equal bases, with a router that tells them apart."""
    if not (out / "moe").is_dir():
        config = parse_config({"family": family, "experts": BASES, "top_k": top_k, "merge": options})
        folders = [out / "bases" / str(number) for number in range(BASES)]
        for folder in folders:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(base)
        merge.run(config, {"bases": out / "bases", "base": base}, out)
    return out / "moe" / "merged"


def loud(folder: Path) -> PreTrainedModel:
    """The MoE with random experts and routers, so that each choice of experts shows in the logits."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_expert_name(name) or name.endswith("mlp.gate.weight"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def keep(model: PreTrainedModel, experts: list[int]) -> fedjets.Kept:
    """The experts in all layers, one further in odd layers so that layers differ."""
    count = getattr(model.config, "n_routed_experts", None) or model.config.num_experts
    shift = count // BASES
    return {layer: torch.tensor(sorted((e + layer * shift) % count for e in experts)) for layer in range(2)}


@contextmanager
def masked(model: PreTrainedModel, kept: fedjets.Kept) -> Iterator[None]:
    """The router of every layer sees only the kept experts; its weights after the families' definitions, written out
    plainly.
    """
    config = model.config

    def route(
        layer: int, module: torch.nn.Module, args: Any, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        logits, scores = output[0], torch.full_like(output[0], 0.0)
        inside = logits[:, kept[layer]]
        scores[:, kept[layer]] = (
            inside.sigmoid() if config.model_type == "deepseek_v3" else inside.softmax(-1)
        )
        count = min(config.num_experts_per_tok, len(kept[layer]))
        if getattr(config, "n_group", 1) > 1:  # whole groups, by their best expert
            groups = scores.view(len(scores), config.n_group, -1)
            best = (
                groups.amax(-1)
                .topk(min(config.topk_group, len(kept[layer]) * config.n_group // scores.shape[1]))
                .indices
            )
            scores = (groups * torch.zeros(groups.shape[:2]).scatter(1, best, 1.0).unsqueeze(-1)).flatten(1)
        weights, indices = scores.topk(count)
        if config.model_type == "deepseek_v2":  # uniform scores are to add up to 1
            weights = weights * (len(kept[layer]) / count)
        else:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, indices

    handles = [
        module.register_forward_hook(partial(route, int(name.split(".")[2])))
        for name, module in model.named_modules()
        if name.endswith(".mlp.gate")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(60).view(3, 20) * 5 % 300).logits


FAMILIES = ("qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "deepseek_v3")
CASES = [(family, 1, {}, 2) for family in FAMILIES] + [
    ("qwen2_moe", 2, {"split": 2, "shared_expert": "average"}, 2),
    ("deepseek", 2, DEEPSEEK, 2),
    ("deepseek", 2, DEEPSEEK, 1),  # fewer experts than the router would choose
    ("deepseek_v2", 2, {"split": 2, "shared_expert": "zero"}, 3),
    ("deepseek_v2", 2, {"split": 2}, 1),
    ("deepseek_v3", 2, DEEPSEEK, 3),
]


@pytest.mark.parametrize(("family", "split", "options", "kept"), CASES)
def test_a_compact_moe_computes_what_the_global_one_does_with_the_kept_experts(
    zoo, tmp_path, family, split, options, kept
):
    moe = loud(fuse(zoo[family], family, tmp_path, **options))
    experts = keep(moe, [base * split + part for base in (0, 2, 3)[:kept] for part in range(split)])
    compact = compact_model(moe, BASES, kept)
    load_compact(compact, moe, experts)
    assert type(compact) is type(moe)
    with masked(moe, experts):
        expected = logits(moe)
    torch.testing.assert_close(logits(compact), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits(moe), expected, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_of_equal_bases_any_choice_computes_the_base(zoo, tmp_path, family):
    moe = AutoModelForCausalLM.from_pretrained(fuse(zoo[family], family, tmp_path, split=2)).eval()
    compact = compact_model(moe, BASES, 3)
    load_compact(compact, moe, keep(moe, [0, 1, 4, 5, 6, 7]))
    torch.testing.assert_close(
        logits(compact), logits(AutoModelForCausalLM.from_pretrained(zoo[family])), atol=1e-4, rtol=1e-4
    )


def test_what_cannot_be_pruned_is_refused(zoo, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(zoo["qwen3_moe"])
    grouped = loud(fuse(zoo["deepseek_v3"], "deepseek_v3", tmp_path))
    for model, bases, kept in [(dense, 4, 2), (grouped, 3, 2), (grouped, 4, 1)]:
        with pytest.raises(InputError) as refused:
            compact_model(model, bases, kept)
        assert refused.value.code == "fedjets-family"
    grouped.config.n_group = 2
    with pytest.raises(InputError, match="2 groups"):
        compact_model(grouped, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_devices_that_return_what_they_got_change_no_bit(zoo, tmp_path, family, dtype):
    moe = loud(fuse(zoo[family], family, tmp_path)).to(dtype).float()
    before = {name: tensor.clone() for name, tensor in tensors_of(moe).items()}
    compact = compact_model(moe, BASES, 2)
    uploads = []
    for experts, weight in (([0, 1], 3.0), ([1, 2], 7.0), ([0, 3], 1.1)):
        load_compact(compact, moe, keep(moe, experts))
        uploads.append(
            (
                {name: t.to(dtype, copy=True) for name, t in tensors_of(compact).items()},
                keep(moe, experts),
                weight,
            )
        )
    aggregate(moe, iter(uploads), dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(moe).items())


@examples(max_examples=8, deadline=None)
@given(data=st.data())
def test_means_are_those_of_the_devices_that_had_an_expert(zoo, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "means"
    moe = loud(fuse(zoo["deepseek_v3"], "deepseek_v3", folder, split=2, shared_expert="zero"))
    before = {name: tensor.clone() for name, tensor in tensors_of(moe).items()}
    compact = compact_model(moe, BASES, 2)
    choice = st.lists(st.integers(0, 7), min_size=4, max_size=4, unique=True)
    chosen = data.draw(st.lists(choice, min_size=1, max_size=4), label="experts of each device")
    weights = data.draw(
        st.lists(st.integers(1, 999).map(float), min_size=len(chosen), max_size=len(chosen)), label="tokens"
    )
    uploads = []
    for number, (experts, weight) in enumerate(zip(chosen, weights, strict=True)):
        torch.manual_seed(number)
        tensors = {name: torch.randn_like(tensor) for name, tensor in tensors_of(compact).items()}
        uploads.append((tensors, keep(moe, experts), weight))
    aggregate(moe, iter(uploads), torch.float32)
    for name, tensor in tensors_of(moe).items():
        if ".mlp.experts." in name or ".mlp.gate." in name:
            layer = int(name.split(".")[2])
            for expert in range(8):
                had = [
                    (u[0][name][u[1][layer].tolist().index(expert)], u[2])
                    for u in uploads
                    if expert in u[1][layer]
                ]
                mean = sum(t * w for t, w in had) / sum(w for _, w in had) if had else before[name][expert]
                torch.testing.assert_close(tensor[expert], mean, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(
                tensor, sum(u[0][name] * u[2] for u in uploads) / sum(weights), atol=1e-5, rtol=1e-5
            )


@given(
    scores=st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=n, max_size=n)
    ),
    kept=st.integers(1, 5),
)
def test_the_draft_spreads_bases_evenly(scores, kept):
    held, anchors = draft(torch.tensor(scores, dtype=torch.float64), kept)
    assert all(len(set(own)) == len(own) == kept for own in held)
    used = [sum(base in own for own in held) for base in range(5)]
    assert max(used) - min(used) <= 1
    assert len(anchors) == len(set(anchors.values())) == min(5, len(scores))
    assert all(held[device][0] == base for device, base in anchors.items())


def test_devices_are_drafted_by_what_sets_them_apart():
    # Everybody's favourite is base 0; the fourth device is the only one that leans away from it.
    held, anchors = draft(
        torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.5, 0.2, 0.3]]), 1
    )
    assert held[3] == [2]
    assert held[2] == [1]
    assert anchors == {0: 0, 2: 1, 3: 2}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_preferences_are_mean_router_probabilities_whatever_the_padding(zoo, tmp_path, family):
    moe = loud(fuse(zoo[family], family, tmp_path, split=2))
    tokenizer = AutoTokenizer.from_pretrained(zoo[family])
    documents = [Window(Document("", row["text"], ""), "private") for row in sentences("medicine", 3)]
    documents.append(Window(Document("", "Gold.", ""), "private"))
    together = preferences(moe, tokenizer, documents, BASES)
    assert list(together) == [0, 1]
    alone = [preferences(moe, tokenizer, [document], BASES) for document in documents]
    counts = torch.tensor(
        [len(tokenizer(d.document.text).input_ids) + 2.0 for d in documents], dtype=torch.float64
    )
    for layer, shares in together.items():
        assert shares.sum().item() == pytest.approx(1)
        means = (torch.stack([own[layer] for own in alone]) * counts[:, None]).sum(0) / counts.sum()
        torch.testing.assert_close(shares, means, atol=1e-6, rtol=1e-5)


# Whole runs ----------------------------------------------------------------------------------------------------------


def federation(
    settings: dict[str, Any], zoo: dict[str, Path], tmp_path: Path, family: str, **merge: Any
) -> tuple[dict, Path]:
    """Settings of five devices, and the start of their global MoE."""
    text = [
        write_rows(tmp_path / f"{d}.jsonl", sentences(d, 120)) for d in ("medicine", "finance", "cooking")
    ]
    values = overlay(
        settings, family=family, experts=BASES, devices=5, merge=merge, device={"types": [str(zoo["mini-gpt2"])]},
        data={"private": [str(path) for path in text], "partition": {"scheme": "by_domain"}},
    )  # fmt: skip
    return values, fuse(zoo[family], family, tmp_path / "start", **merge)


def config_of(values: dict[str, Any], tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path / "config.yaml", values))


def test_two_rounds_teach_the_moe_the_text_of_all_devices(zoo, settings, tmp_path, capfd):
    values, start = federation(settings, zoo, tmp_path, "deepseek", **DEEPSEEK)
    config = config_of(overlay(values, device={"steps": 25}), tmp_path)
    summary = run(config, {"start": start}, tmp_path / "out", FedJETS(rounds=2, learning_rate=1e-2))
    lines = [line for line in capfd.readouterr().err.splitlines() if "devices on base" in line]
    assert lines[0].startswith("[fedjets] round 1/2")
    drafted = [int(part.split()[1]) for part in lines[0].partition("devices on base: ")[2].split(", ")]
    assert sum(drafted) == 10
    assert max(drafted) - min(drafted) <= 1
    assert (summary["rounds"], set(summary["steps"].values()), len(summary["devices"])) == (2, {25}, 5)
    assert summary["losses"][1] < summary["losses"][0] - 0.2

    final = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "moe" / "final").eval()
    moe = AutoModelForCausalLM.from_pretrained(start).eval()
    assert final.config.to_diff_dict() == moe.config.to_diff_dict()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out" / "moe" / "final")(
        sentences("cooking", 1)[0]["text"], return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert final(ids, labels=ids).loss < moe(ids, labels=ids).loss - 0.5
    for name, tensor in tensors_of(final).items():
        pinned = name.endswith("shared_expert_gate.weight")  # or it is no DeepSeek-MoE any more
        assert torch.equal(tensor, tensors_of(moe)[name]) == (pinned or tensor.numel() == 0), name
    # Each expert was on some device in each round, so it has changed.
    changed = (
        tensors_of(final)["model.layers.1.mlp.experts.down_proj"]
        != tensors_of(moe)["model.layers.1.mlp.experts.down_proj"]
    )
    assert changed.flatten(1).any(1).all()

    compact = compact_model(moe, BASES, 2)
    compact.save_pretrained(tmp_path / "compact")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    moved = 2 * sum(p.numel() * 4 for p in stored.parameters())
    assert set(map(str, summary["devices"].values())) == {str({"up_bytes": moved, "down_bytes": moved})}
    assert summary["total_up_bytes"] == summary["total_down_bytes"] == 5 * moved
    assert not (tmp_path / "out" / "work").exists()
    assert run(config, {"start": start}, tmp_path / "out", FedJETS(rounds=2, learning_rate=1e-2)) == summary
    with pytest.raises(InputError, match="made of other data, settings or checkpoints"):
        run(config, {"start": start}, tmp_path / "out", FedJETS(rounds=3, learning_rate=1e-2))


def test_the_learning_rate_is_one_cosine_over_all_rounds(zoo, settings, tmp_path):
    values, start = federation(settings, zoo, tmp_path, "qwen3_moe")
    config = config_of(overlay(values, device={"steps": 30}), tmp_path)
    progress.attach(tmp_path / "out")
    try:
        run(config, {"start": start}, tmp_path / "out", FedJETS(rounds=3, learning_rate=1e-2))
    finally:
        progress.attach(None)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = {row["unit"].split()[0] for row in rows}
    assert len(names) == 5
    for name in names:
        rounds = [
            [r["learning_rate"] for r in rows if r["unit"] == f"{name} round {number}"]
            for number in (1, 2, 3)
        ]
        assert [max(rates) for rates in rounds] == pytest.approx(
            [0.01, 0.0075, 0.0025]
        )  # 1 + cos of 0, 60, 120 degrees
        assert [rates[-1] for rates in rounds] == pytest.approx([0.0075, 0.0025, 0], abs=3e-4)


def test_a_start_in_bf16_moves_half_the_bytes_and_ends_in_bf16(zoo, settings, tmp_path):
    values, start = federation(settings, zoo, tmp_path, "qwen3_moe")
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(start).save_pretrained(half)
    config = config_of(overlay(values, device={"steps": 1}), tmp_path)
    summary = run(config, {"start": half}, tmp_path / "out", FedJETS(rounds=4))
    assert summary["rounds"] == 1  # three rounds would have no step for anybody
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "moe" / "final", dtype="auto")
    assert final.dtype == torch.bfloat16
    compact = compact_model(final, BASES, 2)
    assert (
        summary["total_up_bytes"]
        == 5 * wire_bytes(compact, torch.bfloat16)
        == 5 * wire_bytes(compact, torch.float32) // 2
    )


def test_without_private_text_there_is_nothing_to_do(zoo, settings, tmp_path):
    values, start = federation(settings, zoo, tmp_path, "qwen3_moe")
    values = overlay(values, data={"private": []}) | {"devices": None}
    with pytest.raises(InputError) as refused:
        run(config_of(values, tmp_path), {"start": start}, tmp_path / "out")
    assert refused.value.code == "no-private-data"


@pytest.mark.slow
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(zoo, settings, tmp_path):
    values, start = federation(settings, zoo, tmp_path, "qwen2_moe", split=2)
    write_config(tmp_path / "config.yaml", overlay(values, device={"steps": 24}))
    script = (
        "import sys; from pathlib import Path; from deepfusion.config import load_config\n"
        "from deepfusion_bench.baselines.fedjets import FedJETS, run\n"
        "run(load_config(sys.argv[1]), {'start': Path(sys.argv[2])}, Path(sys.argv[3]), FedJETS(rounds=3))\n"
    )

    def begin(out: Path) -> subprocess.Popen:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-c", script, str(tmp_path / "config.yaml"), str(start), str(out)]
        return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)

    killed = tmp_path / "killed"
    # In the middle of the first round, and of the second after a finished one.
    for wanted in ("uploads-0/d01", "uploads-1/d02"):
        process = begin(killed)
        while process.poll() is None and not (killed / "work" / wanted).is_dir():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "fedjets.json").exists()
    process = begin(killed)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "d00 round 1" not in errors
    config = config_of(overlay(values, device={"steps": 24}), tmp_path)
    whole = run(config, {"start": start}, tmp_path / "whole", FedJETS(rounds=3))
    assert run(config, {"start": start}, killed, FedJETS(rounds=3)) == whole
    with pytest.raises(InputError, match="another-run"):  # what is finished answers no other request
        run(config_of(values, tmp_path), {"start": start}, killed)
    assert digests(killed, "moe") == digests(tmp_path / "whole", "moe")
