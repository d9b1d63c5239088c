"""The command line as a terminal sees it: every option explained and bounded, mistakes in one line, any encoding,
orderly ends.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from pydantic import BaseModel

from conftest import Outcome, overlay, questions, sentences, write_config, write_rows
from deepfusion import __version__, progress
from deepfusion.cli import main, terminal
from deepfusion.cli.app import app
from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.records import Comparison
from deepfusion.schema import Config

ABSURD = ("-1", "0", str(10**12), "nan", "inf", "-inf", "1e400", "")


def walk(
    command: click.Command | None = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    terminal.prepare()
    command = command or typer.main.get_command(app)
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


EVERY = dict(walk())
LEAVES = {path: command for path, command in EVERY.items() if not isinstance(command, click.Group)}
NUMBERS = [
    (path, option)
    for path, command in LEAVES.items()
    for option in command.params
    if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("path", EVERY, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_argument_and_option_is_explained(
    path: tuple[str, ...], flag: str, invoke: Callable[..., Outcome]
) -> None:
    done = invoke(*path, flag)
    assert (done.code, done.err) == (0, "")
    shown = " ".join(done.out.split())
    assert f"Usage: {' '.join(('deepfusion', *path))} " in shown
    for parameter in EVERY[path].params:
        text = getattr(parameter, "help", None)
        assert text, f"{path}: {parameter.name} is not explained"
        assert text in shown
    for name, below in getattr(EVERY[path], "commands", {}).items():
        assert below.get_short_help_str(300), name


def filled(path: tuple[str, ...], option: click.Parameter, value: str) -> list[str]:
    """A command line with every required parameter and the option."""
    line = [*path]
    for parameter in LEAVES[path].params:
        if parameter.required and parameter is not option:
            line += ["x"] if isinstance(parameter, click.Argument) else [parameter.opts[0], "x"]
    return [*line, f"{option.opts[0]}={value}"]


@pytest.mark.parametrize(
    ("path", "option"), NUMBERS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value.name
)
def test_every_number_has_bounds(
    path: tuple[str, ...], option: click.Parameter, invoke: Callable[..., Outcome]
) -> None:
    zero = getattr(option.type, "min", None) == 0 or option.name == "temperature"
    for value in ABSURD:
        if value != "0" or not zero:
            done = invoke(*filled(path, option, value))
            assert (done.code, done.out) == (2, ""), f"{path} {option.name}={value}"
            assert done.err.startswith("deepfusion: ")
            assert done.err.count("\n") == 1


def test_numbers_were_found() -> None:
    assert {option.name for _, option in NUMBERS} >= {
        "max_chars", "batch_size", "judge_documents", "max_new_tokens", "temperature", "seed", "port", "seeds",
        "workers", "rounds",
    }  # fmt: skip


@pytest.mark.parametrize("value", [*ABSURD, "16,0", "16,nan", "16,,32", f"16,{10**12}", "16.5"])
def test_lists_of_numbers_have_bounds(value: str, invoke: Callable[..., Outcome]) -> None:
    done = invoke("bench", "paper", f"--devices={value}")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.endswith("[bad-devices]\n")


@pytest.mark.parametrize("value", [*ABSURD, "-4GB", "0GB", "infGB", "nanGB", "1e99GB"])
def test_amounts_of_memory_have_bounds(value: str, invoke: Callable[..., Outcome]) -> None:
    done = invoke("device", "plan", f"--memory={value}", "--type", "tiny-gpt2", "--json")
    if value == str(10**12):  # a number of bytes
        assert done.code == 0
    else:
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


def numeric_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numeric_keys(field.annotation, f"{prefix}{name}.")
        elif re.search(r"\b(int|float)\b", str(field.annotation)):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("key", numeric_keys())
def test_every_number_of_a_config_has_bounds(key: str) -> None:
    # numbers that a power of two of bytes may reach are bounded further up
    least, most = "-1", str(10**18 if key.endswith("bytes") else 10**12)
    values = ["nan", "inf", "-.inf", "1e400"]
    # The numbers of layers have the base's as their bound (layout-dense).
    for value in [f"[{v}]" for v in values] if key == "merge.dense_layers" else [least, most, *values]:
        with pytest.raises(InputError) as error:
            load_config(overrides=["devices=4", f"{key}={value}"])
        assert "\n" not in str(error.value)
        assert key in str(error.value)


@pytest.mark.parametrize("value", ["-1h", "1000000000000d", "infd", "1.5h", "d", "nan"])
def test_deadlines_have_bounds(value: str) -> None:
    with pytest.raises(InputError, match=r"federation\.deadline"):
        load_config(overrides=[f"federation.deadline={value}"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run --sett x", "no such option --sett; fix: did you mean --set?"),
        ("runn", "no such command 'runn'; fix: did you mean run?"),
        ("config expl", "no such command 'expl'; fix: did you mean explain?"),
        ("evaluate", "missing argument 'MODEL'; fix: deepfusion evaluate --help"),
        ("device plan", "missing option --memory; fix: deepfusion device plan --help"),
        ("run --set", "option --set requires an argument"),
        ("run a b", "got unexpected extra argument (b)"),
        ("run --json=3", "option --json does not take a value"),
        ("evaluate x --data y --max-chars 0", "invalid value for --max-chars: 0 is not in the range"),
        ("generate x y --temperature nan", "invalid value for --temperature: nan"),
        ("status a\nb c", "got unexpected extra argument"),
    ],
)
def test_mistakes_of_usage_are_one_line(line: str, said: str, invoke: Callable[..., Outcome]) -> None:
    done = invoke(*line.split(" "))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"deepfusion: {said}")
    assert done.err.endswith("[bad-usage]\n")
    assert done.err.lower().count("did you mean") <= 1


def test_version_and_completion(invoke: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("--version") == (0, f"deepfusion {__version__}\n", "")
    monkeypatch.setenv(
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1"
    )  # which shell runs these tests does not matter
    script = invoke("--show-completion", "bash")
    assert "_DEEPFUSION_COMPLETE=" in script.out
    assert script.code == 0
    monkeypatch.setenv("_DEEPFUSION_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "deepfusion de")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert invoke().out.split() == ["device"]


def test_nothing_asked_shows_what_could_be(invoke: Callable[..., Outcome]) -> None:
    done = invoke()
    assert done.code == 2
    assert "evaluate" in done.out + done.err
    assert "Traceback" not in done.err


@pytest.mark.usefixtures("wide")
@pytest.mark.usefixtures("wide")
def test_brackets_reach_the_terminal(invoke: Callable[..., Outcome]) -> None:
    """What is printed in a table is no markup."""
    assert "data.public=[in_domain,sampled]" in invoke("bench", "ablation").out


def test_evaluate_names_both_means(
    zoo: dict[str, Path], tmp_path: Path, invoke: Callable[..., Outcome]
) -> None:
    rows = [*sentences("finance", 5), *sentences("medicine", 2), *questions(3)]
    call = ("evaluate", zoo["mini-gpt2"], "--data", write_rows(tmp_path / "text.jsonl", rows))
    found, shown = json.loads(invoke(*call, "--json").out), invoke(*call).out.splitlines()
    lines = {
        name: next(line.split() for line in shown if line.strip().startswith(name))
        for name in ("mean over", "over all")
    }
    for name, values in (("mean over", found["mean_over_domains"]), ("over all", found)):
        assert lines[name][3:6] == [
            f"{values['log_perplexity']:.4f}", f"{values['bits_per_byte']:.4f}", f"{values['token_accuracy']:.2%}",
        ]  # fmt: skip
        assert lines[name][6:9] == [f"{values[key]:.2%}" for key in ("choice_accuracy", "acc", "acc_norm")]
    assert lines["over all"][9] == str(found["tokens"])


# Encodings ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ascii", "latin-1", "cp1252", "utf-8"])
def printed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command on a terminal of another encoding, strict about what it does not have."""

    def call(*arguments: object) -> tuple[int, str, str]:
        streams = {
            name: io.TextIOWrapper(io.BytesIO(), encoding=request.param, errors="strict")
            for name in ("stdout", "stderr")
        }
        monkeypatch.setattr(sys, "argv", ["deepfusion", *map(str, arguments)])
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            with pytest.raises(SystemExit) as left:
                main()
            for stream in streams.values():
                stream.flush()
        texts = [stream.buffer.getvalue().decode(request.param) for stream in streams.values()]  # type: ignore[attr-defined]
        return int(left.value.code or 0), texts[0], texts[1]

    return call


LETTERS = "é – 模型 😀 → naïve"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "läuft–😀"
    run.mkdir()
    row = {
        "log_perplexity": 2.0,
        "perplexity": 7.4,
        "bits_per_byte": 1.0,
        "token_accuracy": 0.2,
        "choice_accuracy": None,
    }
    counts = {"tokens": 5, "examples": 2}
    moe = {**row, **counts, "mean_over_domains": row, "by_domain": {LETTERS: {**row, **counts}}}
    references = {
        "base": None,
        "no_distillation": None,
        "proxies": None,
        "devices": {LETTERS: {**row, **counts, "device": "d", "type": "t"}},
    }
    nothing = {"proxy_against_members": None, "expert_use": None}
    evaluation = {"moe": moe, "references": references, "comparison": dict.fromkeys(Comparison.model_fields)}
    (run / "evaluation.json").write_text(json.dumps(evaluation | nothing))
    (run / "manifest.json").write_text(
        json.dumps({"stages": {"device": {"status": "done", "seconds": 1, "peak_rss_bytes": 1}}})
    )
    (run / "config.yaml").write_text("seed: 0\n")
    return run


def test_any_terminal_shows_tables(printed: Callable[..., tuple[int, str, str]], run_folder: Path) -> None:
    for command in ("status", "report"):
        code, out, err = printed(command, run_folder)
        assert (code, err) == (0, "")
        assert "device" in out or "DeepFusion MoE" in out
        code, out, _ = printed(command, run_folder, "--json")
        assert code == 0
        assert json.loads(out)["run"] == str(run_folder)


def test_any_terminal_shows_text_and_mistakes(
    printed: Callable[..., tuple[int, str, str]], zoo: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": f"The cat sat. {LETTERS}", "domain": LETTERS}) + "\n")
    code, out, err = printed("evaluate", zoo["mini-gpt2"], "--data", data)
    assert (code, "Traceback" in err) == (0, False)
    assert "mean over domains" in out
    found = json.loads(printed("evaluate", zoo["mini-gpt2"], "--data", data, "--json")[1])
    assert list(found["by_domain"]) == [LETTERS]
    code, out, _ = printed("generate", zoo["mini-gpt2"], LETTERS, "--max-new-tokens", 1)
    assert code == 0
    assert "na" in out
    assert (
        json.loads(printed("generate", zoo["mini-gpt2"], LETTERS, "--max-new-tokens", 1, "--json")[1])[
            "prompt"
        ]
        == LETTERS
    )
    code, out, err = printed("status", tmp_path / LETTERS)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert printed("config", "explain")[0] == 0
    assert printed("--help")[0] == 0


def test_the_log_is_always_utf8(tmp_path: Path, printed: Callable[..., tuple[int, str, str]]) -> None:
    before = progress.attached()
    progress.attach(tmp_path)
    try:
        assert printed("config", "explain", "seed")[0] == 0
        progress.say(f"{LETTERS} \udcff")  # a byte of a file name that is no text
    finally:
        progress.attach(before)
    assert LETTERS in (tmp_path / "log.txt").read_text("utf-8")


def child(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "deepfusion.cli", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_plain_locale_reads_and_writes_utf8(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data:\n  private: 模型–é.jsonl\n", "utf-8")
    shown = child("config", "show", "config.yaml", cwd=tmp_path, env=PLAIN)
    out, err = shown.communicate(timeout=120)
    assert (shown.returncode, err) == (0, "")
    assert "jsonl" in out


def test_a_name_that_the_system_cannot_write_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.run(lambda: "模型".encode("ascii")) == 2
    assert capsys.readouterr().err.endswith("fix: set PYTHONUTF8=1 in the environment [bad-encoding]\n")
    with pytest.raises(UnicodeEncodeError):  # a defect of ours
        terminal.run(lambda: "\udcff".encode("utf-8"))


@pytest.mark.slow
def test_a_run_in_a_plain_locale(settings: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", settings)
    text = (tmp_path / "finance.jsonl").read_text("utf-8").replace('"finance"', '"finanças – 金融"')
    (tmp_path / "finance.jsonl").write_text(text, "utf-8")
    run = child(
        "run",
        config,
        "--out",
        tmp_path / "run",
        env=PLAIN | {"PYTHONIOENCODING": "latin-1"},
        encoding="latin-1",
    )
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert "DeepFusion MoE" in out
    assert "finanças - " in err
    assert "Warning" not in err
    assert "finanças – 金融" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert "金融" in (tmp_path / "run" / "report" / "index.html").read_text("utf-8")


# Ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [("config", "explain"), ("--help",), ("config", "explain", "--json")])
def test_a_closed_pipe_is_no_defect(line: tuple[str, ...]) -> None:
    process = child(*line)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything is written
    assert process.stderr.read() == ""
    assert process.wait(60) == terminal.CLOSED


def test_a_reader_that_leaves_early_is_no_defect(invoke: Callable[..., Outcome]) -> None:
    def many() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    assert terminal.run(many) == terminal.CLOSED


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_in_one_line(
    number: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    before = progress.attached()
    try:
        progress.attach(None)
        assert terminal.run(command) == code
        assert capsys.readouterr().err == "deepfusion: stopped\n"
        progress.attach(tmp_path)
        assert terminal.run(command) == code
        assert capsys.readouterr().err == f"deepfusion: stopped; the same command goes on with {tmp_path}\n"
    finally:
        progress.attach(before)
    assert terminal.run(lambda: None) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_with_workers_ends_at_a_signal(
    number: int, code: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Ctrl-C reaches all processes of a terminal; a supervisor's SIGTERM only the first."""
    config = write_config(tmp_path / "config.yaml", overlay(settings, jobs=2, device={"steps": 2000}))
    run = child("run", config, "--out", tmp_path / "run", start_new_session=True)
    assert run.stderr is not None
    lines = []
    for line in run.stderr:
        lines.append(line)
        if line.startswith("[device "):
            break
    os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
    lines += run.stderr.readlines()
    assert run.wait(60) == code
    assert "Traceback" not in "".join(lines)
    assert lines[-1] == f"deepfusion: stopped; the same command goes on with {tmp_path / 'run'}\n"
    for _ in range(200):  # the workers end with the run
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers have outlived the run")


# Warnings -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_warnings_of_libraries_stay_off_the_terminal(
    zoo: dict[str, Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    """LoRA: peft and transformers warn of each other's old names."""
    call = (
        "device",
        "train",
        "--data",
        tmp_path / "medicine.jsonl",
        "--out",
        tmp_path / "upload",
        "--type",
        zoo["mini-llama"],
    )
    trained = child(
        *call, "--set", "device.method=lora", "--set", "device.steps=1", "--set", "device.batch_size=2"
    )
    out, err = trained.communicate(timeout=300)
    assert trained.returncode == 0, err
    assert "held-out loss" in out
    assert "Warn" not in err
    assert all(line.startswith("[device ") for line in err.splitlines()), err


def test_only_the_command_line_silences_warnings() -> None:
    """Whoever imports the library sees what it warns of."""
    root = Path(terminal.__file__).parents[1]
    silencing = [
        path
        for path in root.rglob("*.py")
        if re.search(r"filterwarnings|simplefilter", path.read_text("utf-8"))
    ]
    assert silencing == [root / "cli" / "terminal.py"]


def test_what_libraries_log_stays_off_the_terminal() -> None:
    code = (
        "from deepfusion.cli import terminal; terminal.prepare();"
        "import logging; log = logging.getLogger('some.package');"
        "log.warning('install something'); log.error('broken')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "broken\n"
