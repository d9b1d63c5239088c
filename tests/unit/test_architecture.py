"""Imports go down only, no stage imports another, and nothing dangerous is called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "deepfusion"
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py")
FLOOR = ("errors", "config", "names", "progress", "tiny")


def _level(module: str) -> int:
    """The lower, the more others may import it."""
    top = module.partition(".")[0]
    if top in FLOOR:
        return 0
    return {"stages": 2, "baselines": 3, "pipeline": 3, "federation": 4, "bench": 4, "cli": 5}.get(top, 1)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = {_name(module) for module in MODULES} | {"tiny"}
    ours = {name.removeprefix("deepfusion.") for name in found if name.startswith("deepfusion.")}
    return ours & known


def _name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_go_down(path: Path) -> None:
    own = _name(path)
    for other in _imports(path):
        assert _level(other) <= _level(own), f"{own} imports {other}, which lies above it"
        if _level(own) == 2:
            assert _level(other) < 2, f"stage {own} imports stage {other}: stages meet through folders"


def test_libraries_have_no_cycles() -> None:
    graph = {_name(path): _imports(path) for path in MODULES}

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join([*trail, node])
        for other in graph.get(node, ()):
            visit(other, (*trail, node))

    for node in graph:
        visit(node, ())


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_no_untrusted_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}, f"{path.name}: {called}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


@pytest.mark.parametrize("module", ["server", "join", "gateway", "coordinator"])
def test_moving_uploads_needs_no_model_framework(module: str) -> None:
    check = f"import sys, deepfusion.cli, deepfusion.federation.{module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
