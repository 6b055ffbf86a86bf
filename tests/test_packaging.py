"""What pyproject.toml says is what the tree holds."""

import tomllib
from pathlib import Path

import pytest

from vgen import cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def packages_in_the_tree() -> set[str]:
    found = set()
    for folder, name in (("vgen", "vgen"), ("cli", "vgen.cli"), ("pipelines", "vgen.pipelines")):
        links = {path for path in (ROOT / folder).iterdir() if path.is_symlink()}
        for file in (ROOT / folder).rglob("*.py"):
            if not links & set(file.parents):
                inside = file.parent.relative_to(ROOT / folder).parts
                found.add(".".join((name, *inside)))
    return found


def test_every_package_of_the_tree_is_installed() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_in_the_tree()
    assert SETUPTOOLS["packages"] == sorted(SETUPTOOLS["packages"])


@pytest.mark.parametrize("package", sorted(packages_in_the_tree()))
def test_every_package_has_an_init(package: str) -> None:
    folder = ROOT / package.replace(".", "/")
    assert (folder / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("link", "target"),
    [("vgen/cli", "cli"), ("vgen/pipelines", "pipelines"), ("vgen/checkpoints.yaml", "checkpoints.yaml")],
)
def test_links_lead_to_the_top_of_the_tree(link: str, target: str) -> None:
    assert (ROOT / link).is_symlink()
    assert (ROOT / link).resolve() == (ROOT / target).resolve()


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {requirement.partition(">=")[0].lower().replace("_", "-") for requirement in wanted} <= pinned
    assert "torch==2.13.0" in lines


def test_command_is_where_the_script_points() -> None:
    module, _, name = PROJECT["project"]["scripts"]["vgen"].partition(":")
    assert module == "vgen.cli"
    assert callable(getattr(cli, name))
