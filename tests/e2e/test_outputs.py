"""Whatever `--out` is told, nothing is lost that the command did not make, and nothing finished is taken for
something else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from conftest import (
    Outcome,
    digests,
    run_settings,
    save_checkpoint,
    sentences,
    small_settings,
    write_config,
    write_rows,
)
from deepfusion.cli import main
from deepfusion.errors import InputError
from deepfusion.families.deepseek import export_deepseek_v1
from deepfusion.models import deepen

# device train


@pytest.fixture
def train(zoo, tmp_path, invoke) -> Callable[..., Outcome]:
    """`train(out, *more)`: device train, on data in a folder of its own."""
    (tmp_path / "clinic").mkdir()
    data = write_rows(tmp_path / "clinic" / "private.jsonl", sentences("medicine", 12))
    common = ("--type", zoo["mini-gpt2"], "--set", "device.steps=2", "--set", "data.max_chars=96")

    def call(out: object, *more: object) -> Outcome:
        return invoke("device", "train", "--data", data, "--out", out, *common, *more)

    return call


def refused(done: Outcome, code: str) -> None:
    lines = [line for line in done.err.splitlines() if line.startswith("deepfusion: ")]
    assert (done.code, len(lines)) == (2, 1), done.err
    assert f"[{code}]" in lines[0]
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "out", ["clinic", "clinic/..", ".", "..", "clinic/x/..", "file", "file/up", "gone", "gone/up", "link"]
)
def test_a_place_that_is_somebodys_is_refused_before_any_work(tmp_path, monkeypatch, train, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "clinic")
    before = digests(tmp_path, ".")
    done = train(out)
    refused(done, "bad-out" if out.startswith(("file", "gone")) else "input-in-out")
    assert "[device" not in done.err
    assert digests(tmp_path, ".") == before


@pytest.mark.parametrize("name", ["photo.jpg", "config.json", "card.json", "deep/file"])
def test_a_foreign_file_is_named(tmp_path, train, name):
    path = tmp_path / "up" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    done = train(tmp_path / "up")
    refused(done, "not-ours")
    assert name.split("/")[0] in done.err
    assert path.read_text() == "{}"


@pytest.mark.parametrize("name", [".up.work/notes", ".up.work", ".up.made.json"])
def test_what_lies_where_the_work_would_go_is_left_alone(tmp_path, train, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    refused(train(tmp_path / "up"), "not-ours")
    assert path.read_text() == "mine"


def test_a_link_to_an_empty_folder_is_followed(tmp_path, train):
    (tmp_path / "disk").mkdir()
    (tmp_path / "up").symlink_to(tmp_path / "disk")
    done = train(tmp_path / "up")
    assert done.code == 0, done.err
    assert (tmp_path / "up").is_symlink()
    assert (tmp_path / "disk" / "card.json").is_file()


def test_a_finished_upload_answers_the_request_that_made_it_and_no_other(tmp_path, zoo, train):
    up, data = tmp_path / "up", tmp_path / "clinic" / "private.jsonl"
    first = train(up, "--json")
    made = digests(up, ".")
    again = train(up, "--json")
    assert "nothing to do" in again.err
    assert json.loads(again.out) == json.loads(first.out)
    for other in (
        ("--set", "device.steps=3"),
        ("--set", "seed=1"),
        ("--id", "ward"),
        ("--type", zoo["mini-llama"]),
    ):
        refused(train(up, *other), "another-upload")
    text = data.read_text("utf-8")
    write_rows(data, sentences("medicine", 12, seed=1))
    refused(train(up), "another-upload")
    data.write_text(text, "utf-8")
    assert train(up).code == 0
    assert digests(up, ".") == made
    assert all(
        b"request" not in path.read_bytes() for path in up.iterdir()
    )  # a digest of the text is a fact about it
    shutil.copytree(up, tmp_path / "copy")
    refused(train(tmp_path / "copy", "--id", "up"), "another-upload")  # nobody knows what it was made of


def test_another_checkpoint_at_the_same_place_is_another_request(tmp_path, zoo, train):
    model = Path(shutil.copytree(zoo["mini-gpt2"], tmp_path / "model"))
    assert train(tmp_path / "up", "--type", model).code == 0
    tokenizer = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 77}), "utf-8")
    refused(train(tmp_path / "up", "--type", model), "another-upload")


def test_an_upload_that_was_finished_but_not_yet_at_its_place_is_put_there(tmp_path, train):
    up, work = tmp_path / "up", tmp_path / ".up.work"
    assert train(up).code == 0
    made, text = digests(up, "."), (tmp_path / ".up.made.json").read_text()
    work.mkdir()  # as a kill before the last rename leaves it
    (work / "key").write_text(json.loads(text)["request"])
    up.rename(work / "upload")
    done = train(up)
    assert (done.code, digests(up, ".")) == (0, made)
    assert "2/2" not in done.err
    assert not work.exists()


def test_half_a_training_of_another_request_is_not_taken_up(tmp_path, train):
    work = tmp_path / ".up.work"
    (work / "upload").mkdir(parents=True)
    (work / "key").write_text("0" * 64)
    (work / "upload" / "card.json").write_text("another model")
    done = train(tmp_path / "up")
    assert done.code == 0, done.err
    assert "another request is given up" in done.err


# Run folders


def test_what_somebody_put_among_outputs_is_kept_when_they_are_redone(settings, tmp_path, capfd):
    run, settings = tmp_path / "run", settings | {"devices": settings["devices"][::2]}
    run_settings(settings, run, last="registry")
    write_rows(run / "uploads" / "notes.jsonl", [{"text": "mine"}])
    (run / "notes.txt").write_text("mine")
    run_settings(settings, run, first="device", last="device")
    kept = run / "uploads.kept-1"
    assert (kept / "notes.jsonl").is_file()
    assert not (run / "uploads" / "notes.jsonl").exists()
    assert (run / "notes.txt").read_text() == "mine"
    assert f"kept as {kept.name}" in capfd.readouterr().err
    run_settings(settings, run, first="device", last="device")
    assert not (run / "uploads.kept-2").exists()  # what is as we made it goes


def test_an_own_report_is_written_again_and_another_is_not(settings, tmp_path, invoke):
    run = tmp_path / "run"
    run_settings(settings, run, last="device")
    for _ in range(2):
        assert invoke("report", run).code == 0
    page = run / "report" / "index.html"
    page.write_text("<title>my own page</title>")
    refused(invoke("report", run), "not-ours")
    assert page.read_text() == "<title>my own page</title>"
    page.unlink()
    (run / "report" / "figures.svg").write_text("mine")
    refused(invoke("report", run), "not-ours")
    assert [path.name for path in (run / "report").iterdir()] == ["figures.svg"]


def test_a_config_beside_nothing_else_is_not_overwritten(settings, tmp_path, invoke):
    (tmp_path / "run").mkdir()
    config = write_config(tmp_path / "run" / "config.yaml", settings)
    before = config.read_bytes()
    refused(invoke("run", config, "--out", tmp_path / "run"), "not-a-run")
    assert config.read_bytes() == before


def test_another_checkpoint_at_the_same_place_is_another_run(settings, zoo, tmp_path, capfd):
    model = Path(shutil.copytree(zoo["mini-gpt2"], tmp_path / "model"))
    base = Path(shutil.copytree(zoo["qwen3_moe"], tmp_path / "base"))
    devices = [
        device | {"type": str(model)} if device["id"] == "ward" else device for device in settings["devices"]
    ]
    values = settings | {"devices": devices[::2], "distill": settings["distill"] | {"base": str(base)}}
    run_settings(values, tmp_path / "run", last="merge")
    tokenizer = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 77}), "utf-8")
    capfd.readouterr()
    run_settings(values, tmp_path / "run", last="merge")
    lines = capfd.readouterr().err
    assert "[proxy] unchanged" in lines
    assert "[distill] unchanged" not in lines
    shutil.copyfile(zoo["mini-llama"] / "tokenizer_config.json", model / "tokenizer_config.json")
    with pytest.raises(InputError, match="checkpoints"):
        run_settings(values, tmp_path / "run", last="merge")


def test_fused_uploads_are_taken_again_and_those_of_devices_are_kept(settings, zoo, tmp_path, train, invoke):
    for name, seed in (("ward", 0), ("bank", 1)):
        assert train(tmp_path / "uploads" / name, "--set", f"seed={seed}").code == 0
    given, out = tmp_path / "uploads", tmp_path / "fused"
    common = (
        "--out",
        out,
        "--until",
        "registry",
        "--set",
        f"distill.base={zoo['qwen3_moe']}",
        "--set",
        "experts=2",
    )
    assert invoke("fuse", given, *common).code == 0
    refused(invoke("fuse", out, *common), "input-in-out")
    refused(invoke("fuse", given, "--out", given / "run"), "input-in-out")
    assert train(given / "late", "--set", "seed=2").code == 0
    done = invoke("fuse", given, *common)
    assert done.code == 0, done.err
    assert sorted(path.name for path in (out / "uploads").iterdir()) == ["bank", "late", "ward"]
    run_settings(settings, tmp_path / "run", last="device")
    before = digests(tmp_path / "run", "uploads")
    done = invoke("fuse", given, "--out", tmp_path / "run", *common[2:])
    refused(done, "another-run")
    assert "devices of its own" in done.err
    assert digests(tmp_path / "run", "uploads") == before
    done = invoke("run", write_config(tmp_path / "run.yaml", settings), "--out", out)
    refused(done, "another-run")
    assert f"taken from {given}" in done.err


# Other outputs


def test_pages_and_costs_of_a_bench_replace_their_own_kind_only(tmp_path, invoke):
    (tmp_path / "README.md").write_text("# Mine\n")
    (tmp_path / "other.json").write_text('{"mine": 1}')
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    before = digests(tmp_path, ".")
    refused(invoke("bench", "page", "--out", tmp_path / "README.md"), "not-ours")
    refused(invoke("bench", "costs", "--out", tmp_path / "other.json"), "not-ours")
    refused(invoke("bench", "costs", "--out", tmp_path / "photos"), "bad-out")
    for name in ("paper", "ablation"):
        more = ("vaa",) if name == "ablation" else ("--methods", "base")
        refused(invoke("bench", name, *more, "--out", tmp_path / "photos"), "not-ours")
        refused(
            invoke("bench", name, *more, "--out", tmp_path / "new", "--results", tmp_path / "other.json"),
            "bad-out",
        )
    (tmp_path / "results").mkdir()
    shutil.move(tmp_path / "other.json", tmp_path / "results" / "other.json")
    refused(
        invoke("bench", "page", "--results", tmp_path / "results", "--out", tmp_path / "page.md"),
        "not-a-cell",
    )
    shutil.move(tmp_path / "results" / "other.json", tmp_path / "other.json")
    assert digests(tmp_path, ".") == before


def test_an_export_goes_into_a_folder_of_its_own(zoo, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    model = Path(shutil.copytree(zoo["mini-llama"], tmp_path / "model"))
    for out, code in (("mine", "not-ours"), ("model", "input-in-out"), ("model/v1", "input-in-out")):
        before = digests(tmp_path, ".")
        with pytest.raises(InputError) as error:
            export_deepseek_v1(model, tmp_path / out)
        assert error.value.code == code
        assert digests(tmp_path, ".") == before


def test_the_cache_of_a_made_checkpoint_knows_what_it_was_made_of(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from transformers import GPT2Config  # as the package ships none that is smaller

    from conftest import _tokenizer

    tokenizer = _tokenizer("bytes", 300)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    made = []
    for seed in (0, 1):
        source = save_checkpoint(tmp_path / "source", config, tokenizer, seed)
        made.append(deepen.cached(source, "larger"))
    assert made[0] != made[1]
    assert deepen.cached(tmp_path / "source", "larger") == made[1]
    assert all((folder / "model.safetensors").is_file() for folder in made)


# All of them, with whatever lies there

NAMES = (
    *(
        "photo.jpg",
        "card.json",
        "config.json",
        "model.safetensors",
        "README.md",
        "key",
        "manifest.json",
        "config.yaml",
        "log.txt",
    ),
    *(
        ".lock",
        "uploads/ward/card.json",
        "report/index.html",
        ".work/device/key",
        "federation/notes",
        "results.md",
    ),
    *("moe/final/README.md", "results/cell.json", "deep/er/file.txt"),
)
BESIDE = (
    ".out.work/key",
    ".out.work/training/x",
    ".out.part/x",
    ".out.made.json",
    "out.receipt.json",
    ".out.old/x",
    "results.md",
)


@given(
    inside=st.sets(st.sampled_from(NAMES), min_size=1, max_size=4),
    beside=st.sets(st.sampled_from(BESIDE), max_size=3),
)
@examples(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_command_touches_what_it_did_not_make(zoo, tmp_path_factory, inside, beside):
    folder = tmp_path_factory.mktemp("trees")
    values = small_settings(zoo, folder)
    config, data = write_config(folder / "config.yaml", values), values["devices"][0]["data"]
    out = folder / "out"
    for path in (*(out / name for name in sorted(inside)), *(folder / name for name in sorted(beside))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'["somebody\'s {path}"]')
    before = digests(folder, ".")
    commands: list[list[Any]] = [
        [
            "device",
            "train",
            "--data",
            data,
            "--type",
            zoo["mini-gpt2"],
            "--set",
            "device.steps=1",
            "--out",
            out,
        ],
        ["run", config, "--until", "device", "--set", "device.steps=1", "--out", out],
        ["fuse", zoo["mini-gpt2"].parent, "--until", "device", "--set", "jobs=1", "--out", out],
        ["server", "start", config, "--set", "federation.wait_for=2", "--port", "1", "--out", out],
        ["server", "start", config, "--embedded", "--out", out],
        [
            "device",
            "join",
            "--server",
            "127.0.0.1:1",
            "--data",
            data,
            "--home",
            folder / "home",
            "--out",
            out,
        ],
        ["server", "enroll", "ward", "a key", "--home", out],
        ["report", out],
        ["bench", "paper", "--methods", "base", "--out", out],
        ["bench", "page", "--out", out / "results.md"],
        ["bench", "costs", "--out", out / "photo.jpg"],
    ]
    for command in commands:
        if command[:2] in (["bench", "page"], ["bench", "costs"]) and not command[-1].exists():
            continue  # nothing there that could be lost
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["deepfusion", *map(str, command)])
            with pytest.raises(SystemExit) as left:
                main()
        after = digests(folder, ".")
        assert {name: after.get(name) for name in before} == before, command
        assert left.value.code == 2, command


# Systems


@pytest.mark.slow
def test_device_commands_without_what_only_unix_has(zoo, tmp_path):
    data = write_rows(tmp_path / "private.jsonl", sentences("medicine", 12))
    code = """
import importlib.abc, sys
import psutil  # which takes other means on other systems
gone = ("fcntl", "resource", "pwd", "grp")
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in gone:
            raise ModuleNotFoundError(name=name)
for name in gone:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Gone())
import deepfusion.federation.device.join
from deepfusion.cli import main
for line in LINES:
    sys.argv = ["deepfusion", *line]
    try:
        main()
    except SystemExit as left:
        assert not left.code, line
"""
    lines = [
        ["device", "--help"],
        [
            "device",
            "train",
            "--data",
            str(data),
            "--type",
            str(zoo["mini-gpt2"]),
            "--set",
            "device.steps=1",
            "--out",
            "up",
        ],
        ["device", "check", "up"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("LINES", repr(lines))], capture_output=True, text=True,
        cwd=tmp_path, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hand in this folder" in done.stdout
    assert "a sound upload" in done.stdout


def test_what_the_system_refuses_is_one_line(tmp_path, zoo, train, monkeypatch):
    from deepfusion.stages import device

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "up"))

    monkeypatch.setattr(device, "write_card", full)
    done = train(tmp_path / "up")
    refused(done, "no-access")
    assert "No space left on device" in done.err
    monkeypatch.undo()
    assert train(tmp_path / "up").code == 0  # and nothing was lost
