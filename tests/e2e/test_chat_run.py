"""Conversations through a whole run: devices with and without a chat template, a base with its own, an MoE that
carries it.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from conftest import overlay, run_settings, sentences, write_rows
from deepfusion.models.loading import load_model, load_tokenizer

BASE = (
    "{% for m in messages %}{{ eos_token + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
)
DEVICE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {{ eos_token }}{% endfor %}"


def chatty(source: Path, folder: Path, template: str) -> Path:
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = template
    load_model(source).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(domain: str, count: int) -> list[dict]:
    texts = [row["text"] for row in sentences(domain, 4 * count)]
    roles = ("user", "assistant", "user", "assistant")
    return [
        {
            "messages": [{"role": r, "content": texts[4 * n + k]} for k, r in enumerate(roles)],
            "domain": domain,
        }
        for n in range(count)
    ]


def test_the_moe_carries_the_template_of_its_base(zoo, settings, tmp_path, invoke):
    medicine = write_rows(tmp_path / "medicine.jsonl", conversations("medicine", 30))
    finance = write_rows(tmp_path / "finance.jsonl", conversations("finance", 30))
    base, gpt2 = (
        chatty(zoo["qwen3_moe"], tmp_path / "base", BASE),
        chatty(zoo["mini-gpt2"], tmp_path / "gpt2", DEVICE),
    )
    devices = [
        {"id": name, "type": str(kind), "data": str(data)}
        for name, kind, data in (
            ("ward", gpt2, medicine), ("clinic", gpt2, medicine), ("bank", zoo["mini-llama"], finance),
            ("fund", gpt2, finance),
        )
    ]  # fmt: skip
    run = tmp_path / "run"
    run_settings(
        overlay(
            settings, devices=devices, distill={"base": str(base), "alpha": 0.1}, data={"max_chars": 128}
        ),
        run,
    )
    assert (run / "uploads" / "ward" / "chat_template.jinja").read_text() == DEVICE
    assert (run / "proxies" / "0" / "chat_template.jinja").is_file() != (
        run / "proxies" / "1" / "chat_template.jinja"
    ).is_file()
    assert AutoTokenizer.from_pretrained(run / "moe" / "final").chat_template == BASE
    assert any('"messages"' in line for line in (run / "bases" / "corpus.jsonl").read_text().splitlines())

    found = json.loads(invoke("evaluate", run / "moe" / "final", "--data", medicine, "--json").out)
    plain = chatty(run / "moe" / "final", tmp_path / "plain", None)
    assert found["tokens"] > 0
    assert (
        json.loads(invoke("evaluate", plain, "--data", medicine, "--json").out)["log_perplexity"]
        != found["log_perplexity"]
    )


def test_a_conversation_that_a_template_cannot_write_is_one_line_and_nothing_is_written(
    zoo, tmp_path, invoke
):
    strict = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
        + DEVICE
    )
    folder = chatty(zoo["mini-gpt2"], tmp_path / "gpt2", strict)
    rows = [{"messages": [{"role": "assistant", "content": f"Hello {n}"}]} for n in range(4)]
    data = write_rows(tmp_path / "x.jsonl", rows)
    done = invoke(
        "device",
        "train",
        "--data",
        data,
        "--type",
        folder,
        "--out",
        tmp_path / "up",
        "--set",
        "device.steps=2",
    )
    assert done.code == 2
    assert "cannot write the turns assistant (begin with the user)" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "up").exists()
    rows[2]["messages"][0]["tool_calls"] = [{"id": 1}]
    refused = invoke("evaluate", folder, "--data", write_rows(data, rows))
    assert refused.code == 2
    assert f'{data}:3: "messages"[0] holds "tool_calls"' in refused.err
