"""What is imported is named among the dependencies, and the three places that name them agree."""

import ast
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PRODUCT = [
    *ROOT.glob("*.py"),
    *(file for folder in ("cdiffset", "data", "demo", "feeders", "results") for file in ROOT.glob(f"{folder}/**/*.py")),
]
OURS = {"cdiffset", "data", "demo", "feeders", "results", *(file.stem for file in ROOT.glob("*.py"))}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def ranges(lines: list[str]) -> dict[str, str]:
    requirements = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {normal(each.name): str(each.specifier) for each in requirements}


@pytest.fixture(scope="module")
def stated() -> dict[str, dict[str, str]]:
    """{"core" or the name of an extra: {package: range}} of pyproject.toml."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        name: ranges(lines) for name, lines in {"core": project["dependencies"], **project["optional-dependencies"]}.items()
    }


def test_requirements_files_repeat_the_ranges(stated):
    assert ranges((ROOT / "requirements.txt").read_text().splitlines()) == stated["core"] | stated["metrics"]
    assert (
        ranges((ROOT / "requirements-extra.txt").read_text().splitlines()) == stated["bench"] | stated["lora"] | stated["web"]
    )


def test_the_locked_versions_are_within_the_ranges(stated):
    locked = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    for name, specifier in {name: specifier for group in stated.values() for name, specifier in group.items()}.items():
        versions = [str(each.specifier).removeprefix("==") for each in locked if normal(each.name) == name]
        assert versions or name == "cdiffset", name
        assert all(Requirement(name + specifier).specifier.contains(version) for version in versions), name


distributions = cache(packages_distributions)  # reads the records of all that is installed


def foreign(nodes) -> set[str]:
    """Distributions of the packages of others that are imported."""
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in names} - OURS - sys.stdlib_module_names
    installed = distributions()
    return {normal(installed.get(package, [package])[0]) for package in packages}


def test_every_import_is_a_dependency_and_those_of_extras_are_lazy(stated):
    allowed = set().union(*(stated[group] for group in ("core", "metrics", "bench", "lora", "web")))
    for file in PRODUCT:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert foreign(tree.body) <= stated["core"].keys(), file
        assert foreign(list(ast.walk(tree))) <= allowed, file
