"""What lm-evaluation-harness finds on a few questions, for the test that `acc` and `acc_norm` are its own.

    pip install lm_eval==0.4.13
    python benchmarks/lm_eval_choices.py tests/unit/data/lm_eval_choices.json

Options differ in length, hold letters of several bytes, spaces, and begin inside a word of the prompt's tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = ("tiny-gpt2", "tiny-llama", "tiny-olmo", "tiny-bloom")
QUESTIONS: list[dict[str, Any]] = [
    {
        "prompt": "Question: Which vitamin prevents scurvy?\nAnswer:",
        "choices": ["A", "vitamin B12 (cobalamin)", "C"],
        "answer": 2,
    },
    {
        "prompt": "Frage: Wie heißt die Hauptstadt?\nAntwort:",
        "choices": ["Köln am Rhein", "Zürich", "Bern"],
        "answer": 2,
    },
    {
        "prompt": "Question: The bank sold\nAnswer:",
        "choices": ["its own shares at a steep discount", "gold"],
        "answer": 0,
    },
    {"prompt": "問: 首都は?\n答:", "choices": ["東京", "大阪と京都", "x"], "answer": 0},
    {
        "prompt": "The patient was given a low dose of",
        "choices": ["aspirin", "a", "the loan book", "💊💊"],
        "answer": 0,
    },
    {"prompt": "He was born in the ", "choices": ["house", "year 1900", "é"], "answer": 1},
    {"prompt": "un", "choices": ["believable", "do", "believable, and yet it was so"], "answer": 0},
    {"prompt": "The same twice:", "choices": ["equal", "equal", "other things"], "answer": 1},
    {
        "prompt": "The loan was repaid before\n",
        "choices": ["the end of the year", "it", "noon  or later"],
        "answer": 0,
    },
    {"prompt": "x " * 600 + "and then", "choices": ["x x x", "nothing at all happened", "y"], "answer": 0},
    {
        "prompt": "A fever of",
        "choices": ["39 °C", "one hundred and two degrees Fahrenheit", "½"],
        "answer": 0,
    },
    {"prompt": "Yes or no?", "choices": ["yes", "no"], "answer": 1},
]


def measure(folder: Path, questions: list[dict[str, Any]], batch_size: int = 4) -> dict[str, Any]:
    """The harness's own figures for a checkpoint: `acc`, `acc_norm`, and the log-likelihoods of the options of each
    question.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "questions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in questions), "utf-8")
        task = ConfigurableTask(
            config={
                "task": "questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
                "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
                "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": " ",
                "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc",
                "acc_norm")],
            }
        )  # fmt: skip
        # The prompts as they stand: templates of Jinja would swallow a line break at the end.
        task.doc_to_text = lambda doc, *_: doc["prompt"]
        model = HFLM(pretrained=str(folder), dtype="float32", batch_size=batch_size, device="cpu")
        found = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"]["questions"], key=lambda sample: sample["doc_id"])
    scores = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    numbers = found["results"]["questions"]
    return {"acc": numbers["acc,none"], "acc_norm": numbers["acc_norm,none"], "log_likelihoods": scores}


def main(target: Path) -> None:
    import deepfusion

    tiny = Path(deepfusion.__file__).parent / "tiny"
    found = {name: measure(tiny / name, QUESTIONS) for name in MODELS}
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "made_by": "benchmarks/lm_eval_choices.py",
        "lm_eval": version("lm_eval"),
        "questions": QUESTIONS,
        "models": found,
    }
    target.write_text(json.dumps(about, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
