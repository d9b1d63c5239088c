from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device_models import (
    entry,
    grouped,
    make_model,
    save_adapter_upload,
    save_checkpoint,
    save_compact_upload,
    save_tokenizer,
    save_upload,
)
from safetensors.torch import load_file, save_file

from deepfusion.config import parse_config
from deepfusion.errors import InputError
from deepfusion.models.architecture import read_config
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.models.presets import base_digest
from deepfusion.stages import proxy, registry
from deepfusion.uploads.card import read_card


def run(root: Path, clusters: list[list[str]], types: list[str], average: str = "uniform") -> Path:
    """Register the uploads below `root` and average the given clusters; the folder of the proxies."""
    config = parse_config({"device": {"types": types}, "clustering": {"average": average}})
    registry.run(config, {"uploads": root / "uploads"}, root)
    grouped(*clusters).write(root / "clusters.json")
    inputs = {
        "uploads": root / "uploads",
        "registry": root / "registry.json",
        "clusters": root / "clusters.json",
    }
    proxy.run(config, inputs, root)
    return root / "proxies"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_a_proxy_is_the_plain_mean_of_its_members(kind: str, tmp_path: Path) -> None:
    names = ["d0", "d1", "d2"]
    for seed, name in enumerate(names):
        save_upload(tmp_path / "uploads" / name, kind, seed, tokens=10**seed)
    folder = run(tmp_path, [names[:2], names[2:]], ["tiny"])
    means = load_model(folder / "0").state_dict()
    members = [load_model(tmp_path / "uploads" / name).state_dict() for name in names]
    for name, tensor in means.items():
        torch.testing.assert_close(
            tensor, (members[0][name].double() + members[1][name].double()).div(2).float()
        )
    assert all(
        torch.equal(tensor, members[2][name])
        for name, tensor in load_model(folder / "1").state_dict().items()
    )


@pytest.mark.parametrize(
    ("average", "tokens", "share"),
    [("uniform", (900, 100), 0.5), ("tokens", (900, 100), 0.9), ("tokens", (900, 0), 0.5)],
)
def test_members_count_alike_or_by_their_tokens(
    tmp_path: Path, average: str, tokens: tuple[int, int], share: float
) -> None:
    for seed, name in enumerate(["d0", "d1"]):
        save_upload(tmp_path / "uploads" / name, seed=seed, tokens=tokens[seed])
    folder = run(tmp_path, [["d0", "d1"]], ["tiny"], average) / "0"
    first, second = (load_file(tmp_path / "uploads" / name / "model.safetensors") for name in ("d0", "d1"))
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, share * first[name] + (1 - share) * second[name])


def test_a_proxy_is_a_complete_checkpoint_that_knows_where_it_came_from(tmp_path: Path) -> None:
    for seed, name in enumerate(["d0", "d1"]):
        save_upload(tmp_path / "uploads" / name, seed=seed)
    folder = run(tmp_path, [["d0", "d1"]], ["tiny"]) / "0"
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    lineage = json.loads((folder / "proxy.json").read_text())
    assert lineage["cluster"] == 0
    assert set(lineage["devices"]) == {"d0", "d1"}
    assert "d1" in (folder / "README.md").read_text()
    assert (folder / "generation_config.json").is_file()


def test_equal_members_average_to_themselves_bit_by_bit(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    model = make_model()
    for name in ("a", "b", "c"):
        model.to(torch.bfloat16).save_pretrained(uploads / name)
        save_tokenizer(uploads / name)
    entries = [entry(name) for name in ("a", "b", "c")]
    proxy.average([uploads / name for name in ("a", "b", "c")], entries, [3.0, 1.0, 0.7], tmp_path / "mean")
    mean, member = (load_file(path / "model.safetensors") for path in (tmp_path / "mean", uploads / "a"))
    assert all(torch.equal(mean[name], member[name]) for name in member)
    assert {tensor.dtype for tensor in mean.values()} == {torch.bfloat16}
    assert read_config(tmp_path / "mean").dtype == torch.bfloat16


def test_means_of_bf16_are_taken_in_fp32(tmp_path: Path) -> None:
    values = [1.0, 1.0, 1.0, 1.0078125]  # adding up in bf16 loses the last of these
    folders = []
    for number, value in enumerate(values):
        folder = tmp_path / str(number)
        model = make_model().to(torch.bfloat16)
        with torch.no_grad():
            model.transformer.ln_f.weight.fill_(value)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        folders.append(folder)
    proxy.average(folders, [entry(folder.name) for folder in folders], [1.0] * 4, tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / "model.safetensors")["transformer.ln_f.weight"]
    assert torch.equal(mean, torch.full_like(mean, sum(values) / 4))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_merged_exactly_and_mix_with_full_weights(
    kind: str, rslora: bool, tmp_path: Path
) -> None:
    base, uploads = tmp_path / "base", tmp_path / "uploads"
    save_checkpoint(base, kind)
    digest = base_digest(str(base))
    merged = [save_adapter_upload(uploads / f"d{seed}", base, seed, rslora).state_dict() for seed in range(2)]
    save_upload(uploads / "full", kind, seed=7, base=str(base), base_digest=digest)
    assert read_card(uploads / "full").signature == read_card(uploads / "d0").signature
    folder = run(tmp_path, [["d0"], ["d0", "d1", "full"]], [str(base)])
    members = [*merged, load_model(uploads / "full").state_dict()]
    for name, tensor in load_model(folder / "0").state_dict().items():
        torch.testing.assert_close(tensor, merged[0][name])
    for name, tensor in load_model(folder / "1").state_dict().items():
        torch.testing.assert_close(tensor, sum(member[name] for member in members) / 3)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_compact_uploads_are_averaged_with_all_others(kind: str, tmp_path: Path) -> None:
    base, uploads = tmp_path / "base", tmp_path / "uploads"
    save_checkpoint(base, kind)
    exact = [
        save_compact_upload(uploads / f"d{seed}", base, encoding, seed)
        for seed, encoding in enumerate(("delta8", "delta4"))
    ]
    adapted = save_adapter_upload(uploads / "adapter", base)
    save_upload(uploads / "full", kind, seed=7, base=str(base), base_digest=base_digest(str(base)))
    errors = [read_card(uploads / f"d{seed}").encoding_error for seed in range(2)]
    folder = run(tmp_path, [["d0"], ["d1"], ["d0", "d1", "adapter", "full"]], [str(base)])
    for seed in range(2):
        decoded, truth = load_model(folder / str(seed)).state_dict(), exact[seed].state_dict()
        largest = max(float((tensor - truth[name]).abs().max()) for name, tensor in decoded.items())
        assert 0 < largest <= errors[seed] + 1e-6  # the sum with the base is rounded once more
    assert errors[0] < errors[1] / 10
    members = [load_model(folder / "0"), load_model(folder / "1"), adapted, load_model(uploads / "full")]
    for name, tensor in load_model(folder / "2").state_dict().items():
        torch.testing.assert_close(tensor, sum(member.state_dict()[name] for member in members) / 4)


def test_a_compact_upload_is_as_precise_as_its_base(tmp_path: Path) -> None:
    base, uploads = tmp_path / "base", tmp_path / "uploads"
    make_model().to(torch.bfloat16).save_pretrained(base)
    save_tokenizer(base)
    exact = save_compact_upload(uploads / "d0", base).state_dict()
    folder = run(tmp_path, [["d0"]], [str(base)])
    mean = load_file(folder / "0" / "model.safetensors")
    assert {tensor.dtype for tensor in mean.values()} == {torch.bfloat16}
    for name, tensor in mean.items():
        torch.testing.assert_close(
            tensor.float(), exact[name], rtol=2**-8, atol=read_card(uploads / "d0").encoding_error
        )


def test_a_base_stored_without_the_prefix_of_its_trunk_is_understood(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_checkpoint(base)
    tensors = load_file(base / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(
        plain | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    exact = [
        save_adapter_upload(tmp_path / "uploads" / "d0", base),
        save_compact_upload(tmp_path / "uploads" / "d1", base),
    ]
    folder = run(tmp_path, [["d0"], ["d1"]], [str(base)])
    for number, model in enumerate(exact):
        for name, tensor in load_model(folder / str(number)).state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=[1e-6, 2e-4][number])


@pytest.mark.parametrize("save", [save_adapter_upload, save_compact_upload])
def test_an_upload_on_another_base_is_refused(save: Callable[[Path, Path], object], tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_checkpoint(base)
    save(tmp_path / "d0", base)
    other = entry("d0", base=str(base), base_digest="0" * 64)
    with pytest.raises(InputError, match="base-differs"):
        proxy.average([tmp_path / "d0"], [other], [1.0], tmp_path / "mean")


def test_an_interrupted_stage_keeps_the_proxies_it_has(tmp_path: Path) -> None:
    for seed, name in enumerate(["d0", "d1"]):
        save_upload(tmp_path / "uploads" / name, seed=seed)
    folder = run(tmp_path, [["d0"], ["d1"]], ["tiny"])
    before = (folder / "0" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(folder / "1")
    (folder / ".1.part").mkdir()
    run(tmp_path, [["d0"], ["d1"]], ["tiny"])
    assert (folder / "0" / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]
