"""One model: evaluate it, continue a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import rich
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from deepfusion.cli.shared import Json, print_json
from deepfusion.errors import InputError
from deepfusion.sections import MOST_BATCH, MOST_CHARS, MOST_DOCUMENTS, MOST_SEED

model_app = typer.Typer()


def _temperature(value: float) -> float:
    if value and not 0.01 <= value <= 100:  # also refuses nan
        raise typer.BadParameter(f"{value} is neither 0 nor 0.01 to 100")
    return value


@model_app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    data: Annotated[str, typer.Option(help="JSONL file, or any data source")],
    max_chars: Annotated[
        int, typer.Option(min=64, max=MOST_CHARS, help="longer texts are cut into windows")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="windows per forward pass")] = 16,
    judge: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible API that scores open answers, 0 to 100")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="name of the judging model there")] = None,
    judge_documents: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_DOCUMENTS, help="judge at most so many answers; default: all"),
    ] = None,
    judge_cache: Annotated[
        Path | None, typer.Option(help="JSONL file of scores; what stands there costs nothing")
    ] = None,
    judge_prices: Annotated[
        str | None, typer.Option(help="IN,OUT per million tokens, to reckon the cost")
    ] = None,
    json_: Json = False,
) -> None:
    """Log-perplexity, perplexity, bits per byte, token and multiple-choice accuracy on held-out text, judged
    answers."""
    from deepfusion.learning.metrics import evaluate_model
    from deepfusion.models.loading import load_model, load_tokenizer
    from deepfusion.models.presets import resolve
    from deepfusion.text.sources import load_rows
    from deepfusion.text.windows import say_cut

    documents = load_rows(data)
    say_cut(documents, max_chars)
    referee = None
    if judge is not None:
        from deepfusion.judge import Judge, parse_prices
        from deepfusion.learning.answers import answer_all, open_questions

        prices = None if judge_prices is None else parse_prices(judge_prices)
        referee = Judge(judge, judge_model or "", prices=prices, cache=judge_cache)
        questions = open_questions(documents, judge_documents)
        referee.warn(len(questions))
    elif any(option is not None for option in (judge_model, judge_documents, judge_cache, judge_prices)):
        raise InputError("options of a judge without a judge", fix="add --judge URL", code="bad-input")
    loaded = load_model(resolve(str(model)), "auto")
    tokenizer = load_tokenizer(resolve(str(model)))
    result = evaluate_model(loaded, tokenizer, documents, batch_size=batch_size, max_chars=max_chars)
    answers = answer_all(loaded, tokenizer, questions, batch_size=batch_size) if referee else []
    result["judge"] = referee.score(answers) if referee else None
    if json_:
        return print_json(result)
    judged = result["judge"]
    rich.print(_metrics_table(str(model), result))
    if judged:
        cost = "" if judged["cost"] is None else f", cost {judged['cost']:.4f}"
        print(
            f"judge {judged['model']}: {judged['scored']} scored, {judged['unscored']} unscored, "
            f"{judged['cached']} cached, "
            f"{judged['prompt_tokens']} + {judged['completion_tokens']} tokens{cost}"
        )


@model_app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_CHARS, help="tokens to write at most")] = 64,
    temperature: Annotated[
        float, typer.Option(callback=_temperature, help="0: always the likeliest token; else 0.01 to 100")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="seed of what is drawn at a temperature")
    ] = 0,
    json_: Json = False,
) -> None:
    """Continue a prompt."""
    from deepfusion.models.generation import complete
    from deepfusion.models.loading import load_model, load_tokenizer
    from deepfusion.models.presets import resolve

    folder = resolve(str(model))
    text, tokens = complete(
        load_model(folder, "auto"), load_tokenizer(folder), prompt, max_new_tokens, temperature, seed
    )
    if json_:
        return print_json({"prompt": prompt, "completion": text, "tokens": tokens})
    print(prompt + text)


def _metrics_table(title: str, result: dict[str, Any]) -> Table:
    """Domain by domain, the mean over domains, which is the headline, and the figures over all tokens; losses are per
    token.
    """
    shown = {
        "log_perplexity": ("nats", ".4f"),
        "bits_per_byte": ("bits/byte", ".4f"),
        "token_accuracy": ("accuracy", ".2%"),
    }
    if result["acc"] is not None:
        shown |= {
            "choice_accuracy": ("choice", ".2%"),
            "acc": ("acc", ".2%"),
            "acc_norm": ("acc_norm", ".2%"),
        }
    judged = result["judge"]
    scores: dict[str, Any] = (
        {name: row["score"] for name, row in judged["by_domain"].items()} if judged else {}
    )
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
