"""In place of devices: uploads are copied, plain checkpoints adopted, what cannot be read keeps its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device_models import save_checkpoint, save_upload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import digests
from deepfusion.config import parse_config
from deepfusion.models.loading import load_model
from deepfusion.records import Transport
from deepfusion.stages import receive
from deepfusion.uploads.card import read_card
from deepfusion.uploads.check import check_upload, read_refusal


def run(given: Path, out: Path, **inputs: Path) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return receive.run(parse_config({"jobs": 1, "precision": "fp32"}), {"given": given, **inputs}, out)


def test_uploads_are_taken_as_they_are_and_checkpoints_get_a_card(tmp_path: Path) -> None:
    save_upload(tmp_path / "given" / "ward")
    save_checkpoint(tmp_path / "given" / "plain", seed=1)
    (tmp_path / "given" / "notes.txt").write_text("mine")
    assert run(tmp_path / "given", tmp_path / "out") == {"uploads": 2, "plain_checkpoints": 1, "left_out": 1}
    given, taken = tmp_path / "given", tmp_path / "out" / "uploads"
    assert digests(taken, "ward") == digests(given, "ward")
    card = read_card(taken / "plain")
    assert (card.device, card.tokens, card.loss_before) == ("plain", 0, None)
    assert check_upload(taken / "plain", 10**9) == []
    weights = "model.safetensors"
    adopted, original = load_file(taken / "plain" / weights), load_file(given / "plain" / weights)
    assert all(torch.equal(adopted[name], tensor) for name, tensor in original.items())
    moved = Transport.read(tmp_path / "out" / "transport.json")
    assert set(moved.devices) == {"ward", "plain"}
    assert moved.total_up_bytes == sum(path.stat().st_size for path in taken.rglob("*") if path.is_file())


def test_what_cannot_be_read_keeps_its_reason_and_stops_nobody(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "given" / "good")
    save_checkpoint(tmp_path / "given" / "nan", seed=1)
    path = tmp_path / "given" / "nan" / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, path, {"format": "pt"})
    run(tmp_path / "given", tmp_path / "out")
    assert read_card(tmp_path / "out" / "uploads" / "good").device == "good"
    problem = read_refusal(tmp_path / "out" / "uploads" / "nan")
    assert problem is not None
    assert problem.code == "non-finite"


def test_an_adapter_comes_in_merged_into_its_base(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "given" / "base", "llama")
    tuned = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "given" / "base")
    tuned.save_pretrained(tmp_path / "given" / "tuned")
    run(tmp_path / "given", tmp_path / "out")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        got = load_model(tmp_path / "out" / "uploads" / "tuned")(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("killed", ["before its card", "not at all"])
def test_what_is_there_already_is_not_sampled_again(
    tmp_path: Path, killed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "given" / "plain")
    run(tmp_path / "given", tmp_path / "out")
    before = digests(tmp_path / "out", "uploads")
    if killed == "before its card":
        (tmp_path / "out" / "uploads" / "plain" / "card.json").unlink()
    capfd.readouterr()
    run(tmp_path / "given", tmp_path / "out")
    assert ("embedding what it samples" in capfd.readouterr().err) == (killed == "before its card")
    assert digests(tmp_path / "out", "uploads") == before


def test_late_uploads_come_with_the_others(tmp_path: Path) -> None:
    save_upload(tmp_path / "uploads" / "ward")
    save_upload(tmp_path / "late" / "bank", seed=1)
    assert run(tmp_path / "uploads", tmp_path / "out", late=tmp_path / "late")["uploads"] == 2
    assert {path.name for path in (tmp_path / "out" / "uploads").iterdir()} == {"ward", "bank"}
