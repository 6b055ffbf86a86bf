"""Importing what the command line needs for `--help` loads nothing heavy, and imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "numpy", "diffusers", "transformers", "PIL", "huggingface_hub")


def test_the_light_modules_load_nothing_heavy() -> None:
    light = (
        "vgen vgen.errors vgen.request vgen.plan vgen.checkpoints vgen.options vgen.runtime vgen.sampling "
        "vgen.backbones vgen.editing.request vgen.editing.plan"
    )
    program = f"""
import sys
for name in {light.split()!r}:
    __import__(name)
    heavy = [module for module in {HEAVY!r} if module in sys.modules]
    assert not heavy, (name, heavy)
from vgen.checkpoints import resolve
from vgen.plan import plan
from vgen.request import GenerateRequest
plan(GenerateRequest(prompt="a red ball"), resolve("toyland"))
print([module for module in {HEAVY!r} if module in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("folder", "above"), [("vgen", ("vgen.cli", "vgen.pipelines")), ("pipelines", ("vgen.cli",)), ("cli", ())]
)
def test_imports_point_one_way(folder: str, above: tuple[str, ...]) -> None:
    links = {ROOT / "vgen" / "cli", ROOT / "vgen" / "pipelines"}
    # `python -m vgen` is the command line's door, not a part of the library.
    doors = {ROOT / "vgen" / "__main__.py"}
    files = [path for path in (ROOT / folder).rglob("*.py") if path not in doors and not links & set(path.parents)]
    assert files
    for path in files:
        for name in imported(path):
            assert not any(name == upper or name.startswith(f"{upper}.") for upper in above), f"{path} imports {name}"
            assert name.split(".")[0] not in ("cli", "pipelines"), f"{path} imports {name} by its bare name"
