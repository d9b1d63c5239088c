"""What a run folder keeps: one that release 0.1.0 made, one whose config changed, one of a refused command."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import digests, write_config
from deepfusion import digests as digests_module
from deepfusion import pipeline, plugins
from deepfusion.config import load_config
from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.folders import LOCK, locked
from deepfusion.learning.distillation import Distiller
from deepfusion.manifest import Key, Manifest
from deepfusion.pipeline import NAMES
from deepfusion.schema import Config
from deepfusion.stages import distill

MADE_BY_0_1_0 = Path(__file__).parent / "data" / "run-0.1.0"
RUN = Path("run")


@pytest.fixture(autouse=True)
def old(tmp_path, monkeypatch) -> Path:
    """The working directory: a finished run of release 0.1.0 in run/, and what it was made of."""
    home = Path(shutil.copytree(MADE_BY_0_1_0, tmp_path / "old"))
    monkeypatch.chdir(home)
    return home


def go_on(*overrides: str, **options: Any) -> dict[str, str]:
    """Run again; what became of each stage: unchanged, done, or why it began anew."""
    before = len((RUN / "log.txt").read_text("utf-8")) if (RUN / "log.txt").is_file() else 0
    pipeline.run(load_config("config.yaml", overrides), RUN, **options)
    found: dict[str, str] = {}
    for line in (RUN / "log.txt").read_text("utf-8")[before:].splitlines():
        _, _, text = line.partition(" [")
        name, _, said = text.partition("] ")
        if name in NAMES and (name not in found or not said.startswith("done")):
            found[name] = said
    return found


def kept(found: dict[str, str]) -> list[str]:
    return [name for name, said in found.items() if said.startswith("unchanged")]


def refusal(*overrides: str, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        go_on(*overrides, **options)
    return caught.value


def test_a_run_of_0_1_0_is_continued_and_nothing_is_made_again():
    before = digests(RUN, "uploads", "proxies", "bases", "moe")
    assert kept(go_on()) == list(NAMES[:-1])
    assert {name: digest for name, digest in digests(RUN, *["uploads", "proxies", "bases", "moe"]).items()
            if not name.endswith("README.md")} == {
        name: digest for name, digest in before.items() if not name.endswith("README.md")
    }  # fmt: skip
    manifest = Manifest.read(RUN)
    assert manifest.schema_version == 1
    assert all(isinstance(entry.key, Key) for entry in manifest.stages.values())
    assert kept(go_on()) == list(NAMES[:-1])


def test_a_changed_setting_in_it_is_noticed_and_named():
    found = go_on("tune.steps=3")
    assert kept(found) == ["device", "registry", "cluster", "proxy", "distill", "merge"]
    assert found["tune"] == "begins anew: settings tune.steps 3 (it was 2)"
    assert found["evaluate"] == "begins anew: other control, moe"


def test_devices_asked_to_train_otherwise_are_refused_with_what_differs():
    before = digests(RUN, "uploads")
    error = refusal("seed=1", "device.steps=5", "device.batch_size=2")
    assert error.code == "another-run"
    assert "another seed 1 (it was 0)" in error.what
    assert "settings device.steps 5 (it was 4), device.batch_size 2 (it was 4)" in error.what
    assert "data" not in error.what
    assert digests(RUN, "uploads") == before
    assert kept(go_on()) == list(NAMES[:-1])  # the refusal has changed nothing


def test_after_the_first_continuation_other_data_and_checkpoints_are_named_too():
    go_on(last="proxy")
    rows = Path("ward.jsonl").read_text("utf-8")
    Path("ward.jsonl").write_text(rows.upper(), "utf-8")
    assert refusal().what.endswith("than is asked now: other data ward.jsonl")
    Path("ward.jsonl").write_text(rows, "utf-8")
    shutil.copyfile("models/base/model.safetensors", "models/device/model.safetensors")
    assert refusal().what.endswith("than is asked now: other checkpoints models/device")


@pytest.mark.parametrize("change", ["data", "checkpoint", "config"])
def test_what_0_1_0_cannot_have_read_is_not_taken_over(change):
    if change == "data":
        Path("ward.jsonl").write_text(Path("ward.jsonl").read_text("utf-8").upper(), "utf-8")
    elif change == "checkpoint":
        shutil.copyfile("models/base/model.safetensors", "models/device/model.safetensors")
    else:
        (RUN / "config.yaml").unlink()
    assert refusal().code == "another-run"


def test_devices_of_a_killed_0_1_0_are_not_trained_again():
    """As a kill leaves it: one device has finished in the work folder, the other has not."""
    manifest = json.loads((RUN / "manifest.json").read_text("utf-8"))
    work = RUN / ".work" / "device"
    work.mkdir(parents=True)
    (work / "key").write_text(manifest["stages"]["device"]["key"])
    (work / "out" / "uploads").mkdir(parents=True)
    (RUN / "uploads" / "ward").rename(work / "out" / "uploads" / "ward")
    for name in (*NAMES[1:], "uploads", "proxies", "bases", "moe"):
        shutil.rmtree(RUN / name, ignore_errors=True)
    entry = manifest["stages"]["device"] | {"status": "running", "digests": {}, "known": []}
    (RUN / "manifest.json").write_text(json.dumps(manifest | {"stages": {"device": entry}}))
    before = digests(work / "out", "uploads")
    assert go_on(last="device")["device"] == "continues"
    log = (RUN / "log.txt").read_text("utf-8")
    assert "[device bank device] 4/4" in log
    assert "[device ward device]" not in log
    assert digests(RUN, "uploads").items() > before.items()


def test_a_second_start_reads_no_upload(monkeypatch):
    go_on()
    weights = RUN / "uploads" / "ward" / "model.safetensors"
    read: list[Path] = []
    monkeypatch.setattr(digests_module, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    assert kept(go_on()) == list(NAMES[:-1])
    assert [path for path in read if path.suffix == ".safetensors"] == []
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"1234")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had happened
    assert "digest-mismatch" in refusal().what
    assert "[device] uploads was changed since" in (RUN / "log.txt").read_text()


@pytest.mark.parametrize(
    ("place", "first", "damage"),
    [
        ("clusters.json", "cluster", "altered"),
        ("proxies/0/model.safetensors", "proxy", "removed"),
        ("bases/corpus.jsonl", "distill", "emptied"),
        ("bases/0/config.json", "distill", "altered"),
        ("moe/merged/model.safetensors", "merge", "altered"),
        ("moe/final/model.safetensors", "tune", "emptied"),
        ("evaluation.json", "evaluate", "removed"),
    ],
)
def test_a_damaged_output_is_made_again(place, first, damage):
    go_on(first="cluster")  # the machine that made the fixture may round otherwise
    before = digests(RUN, "proxies", "bases", "moe")
    path = RUN / place
    if damage == "removed":
        path.unlink()
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    found = go_on()
    assert first not in kept(found)
    assert (RUN / "log.txt").read_text("utf-8").count(
        f"[{first}] begins anew: {place.partition('/')[0]}"
    ) == 1
    assert kept(found)[: NAMES.index(first)] == list(NAMES[: NAMES.index(first)])
    after = digests(RUN, "proxies", "bases", "moe")
    assert {name: digest for name, digest in after.items() if ".kept-" not in name} == before


def test_a_file_in_the_place_of_an_output_is_kept_beside_it():
    go_on()
    shutil.rmtree(RUN / "moe" / "final")
    (RUN / "moe" / "final").write_text("mine")
    assert "tune" not in kept(go_on())
    assert (RUN / "moe" / "final" / "config.json").is_file()
    assert (RUN / "moe" / "final.kept-1").read_text() == "mine"
    shutil.rmtree(RUN / "moe")
    (RUN / "moe").write_text("mine")
    assert refusal().code == "bad-out"


def test_devices_are_not_trained_again_for_a_lost_record():
    (RUN / "transport.json").unlink()
    error = refusal()
    assert error.code == "another-run"
    assert "transport.json is missing" in error.what
    assert (RUN / "uploads" / "ward" / "card.json").is_file()


def test_data_that_is_not_there_is_said_to_be_missing():
    Path("ward.jsonl").rename("elsewhere.jsonl")
    assert refusal().code == "no-data"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_config_of_an_old_run_makes_no_traceback(content):
    (RUN / "config.yaml").write_bytes(content)
    assert refusal().code == "another-run"


def test_a_damaged_manifest_is_named():
    (RUN / "manifest.json").write_text("{")
    assert "manifest.json is missing or damaged" in refusal().what


def test_what_a_killed_process_left_is_cleared_away():
    (RUN / ".manifest.json.0123abcd.part").write_text("{")
    (RUN / ".mine.part").write_text("mine")
    go_on()
    assert not (RUN / ".manifest.json.0123abcd.part").exists()
    assert (RUN / ".mine.part").read_text() == "mine"


def one_way(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    return distill.run(config, inputs, out)


def other_way(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    return distill.run(config, inputs, out)


def test_another_function_or_revision_in_place_of_a_stage_is_noticed():
    stage = next(stage for stage in pipeline.STAGES if stage.name == "distill")
    go_on(instead=[replace(stage, run=one_way)], last="distill")
    assert "distill" in kept(go_on(instead=[replace(stage, run=one_way)], last="distill"))
    found = go_on(instead=[replace(stage, run=other_way)], last="distill")
    assert found["distill"].startswith("begins anew: another method: ")
    assert found["distill"].endswith(".one_way)")
    found = go_on(instead=[replace(stage, run=other_way, revision=2)], last="distill")
    assert found["distill"] == "begins anew: revision 2 of the stage (it was 1)"


class OneMethod(Distiller):
    """What a package adds as the method `own`."""


class OtherMethod(Distiller):
    """What it has become."""


def test_another_method_of_the_same_name_is_noticed(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", dict(plugins._registered))
    plugins.register("methods", "own", OneMethod)
    go_on("distill.method=own", last="distill")
    assert "distill" in kept(go_on("distill.method=own", last="distill"))
    plugins.register("methods", "own", OtherMethod)
    assert go_on("distill.method=own", last="distill")["distill"] == "begins anew: other distill.method"


def test_a_moved_base_of_the_same_content_is_the_same_to_merge_and_evaluate():
    shutil.copytree("models/base", "models/moved")
    go_on(first="distill")  # the machine that made the fixture may round otherwise
    found = go_on("distill.base=models/moved")
    assert "distill" not in kept(found)  # where the base lies is said to it
    assert {"merge", "evaluate"} <= set(kept(found))


def test_a_stage_that_nobody_runs_any_more_is_interrupted():
    manifest = Manifest.read(RUN)
    manifest.stages["tune"] = manifest.stages["tune"].model_copy(update={"status": "running"})
    manifest.write(RUN)

    def state() -> str:
        return {stage["name"]: stage["status"] for stage in pipeline.status(RUN)["stages"]}["tune"]

    assert state() == "interrupted"
    with locked(RUN / LOCK):
        assert state() == "running"
    assert state() == "interrupted"


def test_what_was_made_of_something_older_is_outdated(invoke):
    """Until it is made again, nothing shows it as what the run came to."""

    def states() -> dict[str, str]:
        return {stage["name"]: stage["status"] for stage in pipeline.status(RUN)["stages"]}

    command = ("run", "config.yaml", "--out", RUN, "--set", "tune.steps=1")
    done = invoke(*command, "--until", "tune")
    assert states() == dict.fromkeys(NAMES, "done") | {"evaluate": "outdated", "report": "outdated"}
    assert "outdated, for what they are made of has changed: evaluate, report" in done.out
    assert "nats" not in done.out
    assert "report: " not in done.out
    assert "the stages up to tune done" in done.err
    found = json.loads(invoke(*command, "--until", "tune", "--json").out)
    assert (found["evaluation"], found["outdated"]) == (None, ["evaluate", "report"])
    found = json.loads(invoke(*command, "--json").out)
    assert found["evaluation"] is not None
    assert found["outdated"] == []
    assert set(states().values()) == {"done"}
    go_on("tune.steps=1", first="merge", last="merge")  # comes to the same
    assert set(states().values()) == {"done"}


def test_a_refused_command_leaves_no_folder(invoke, tmp_path):
    config = load_config("config.yaml").model_dump(mode="json")
    config["distill"]["base"] = "models/device"
    path = write_config(tmp_path / "bad.yaml", config)
    done = invoke("run", path, "--out", tmp_path / "out")
    assert done.code == 2, done.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert invoke("run", path, "--out", tmp_path / "out").code == 2
    assert list((tmp_path / "out").iterdir()) == []
