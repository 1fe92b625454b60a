"""The door, the commands and the layers: what a stranger meets first."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bayeslr

# The whole public door, as docs/architecture.md lists it.
PUBLIC = [
    "Posterior",
    "Prior",
    "RunTable",
    "Target",
    "fit",
    "read_runs",
    "report",
    "sweep",
]
HEAVY = {
    "numpy", "scipy", "pandas", "pyarrow", "xarray", "matplotlib",
    "jax", "jaxlib", "numpyro", "pymc", "pytensor", "arviz", "torch", "optuna", "sqlalchemy",
}  # fmt: skip


def modules_after(code: str, cwd: Path) -> set[str]:
    """Names in sys.modules after a fresh interpreter, in another folder, ran the code."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_the_door_is_what_the_documents_say(root: Path) -> None:
    assert sorted(bayeslr.__all__) == PUBLIC
    documented = (root / "docs" / "architecture.md").read_text()
    for name in PUBLIC:
        assert hasattr(bayeslr, name), f"bayeslr.{name} does not resolve"
        assert f"`{name}" in documented, f"docs/architecture.md does not list {name}"
    assert set(PUBLIC) <= set(dir(bayeslr))


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = modules_after("import bayeslr; bayeslr.__version__", tmp_path)
    assert "bayeslr" in loaded
    assert not HEAVY & loaded


def test_the_library_never_loads_torch_or_optuna(tmp_path: Path) -> None:
    loaded = modules_after(
        "import bayeslr\nfor name in bayeslr.__all__: getattr(bayeslr, name)", tmp_path
    )
    assert not {"torch", "optuna", "bayeslr_runners"} & loaded


@pytest.mark.parametrize(
    "arguments", [["--help"], ["fit", "--help"], ["predict", "--help"], ["import", "--help"]]
)
def test_help_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    loaded = modules_after(
        f"import sys; sys.argv = ['bayeslr', *{arguments!r}]\n"
        "from bayeslr.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code",
        tmp_path,
    )
    assert "typer" in loaded
    assert not HEAVY & loaded
    # 330 modules at the time of writing, most of them the standard library's and typer's.
    assert len(loaded) < 600


def test_version_is_one(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["version"] == bayeslr.__version__
    changelog = (root / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog


def test_the_commands_of_the_documents_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (root / "Makefile").read_text(), re.M))
    assert {"quickstart", "test", "test-all", "lint", "types", "contracts", "wheel"} <= targets
    readme = (root / "README.md").read_text()
    commands = re.findall(r"^ {4}(make .*|bayeslr .*)$", readme, re.M)
    assert [c.split("#")[0].strip() for c in commands[:2]] == ["make quickstart", "make test"]
    for page in [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*"))]:
        for target in re.findall(r"`make ([a-z][a-z-]*)", page.read_text()):
            assert target in targets, f"{page.name} names make {target}, which does not exist"
    for target in re.findall(r"^ {4}make ([a-z-]+)", readme, re.M):
        assert target in targets


def test_the_verbs_of_the_readme_exist(root: Path) -> None:
    import typer.main

    from bayeslr.cli import app

    group = typer.main.get_command(app)
    verbs = set(group.commands)  # type: ignore[attr-defined]
    readme = (root / "README.md").read_text()
    named = set(re.findall(r"^ {4}bayeslr ([a-z]+)", readme, re.M))
    named |= set(re.findall(r"`bayeslr ([a-z]+)", readme))
    assert {"fit", "predict", "report", "sweep"} <= named
    assert named <= verbs


def test_links_of_the_documents_lead_somewhere(root: Path) -> None:
    for page in [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which is missing"


def test_import_contracts(root: Path) -> None:
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("import-linter is not installed (dependency group dev)")
    done = subprocess.run([linter], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_every_python_has_its_pins(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    dependencies = [
        re.split(r"[<>=\[]", text)[0].lower().replace("_", "-")
        for extra in ([project["dependencies"]], project["optional-dependencies"].values())
        for group in extra
        for text in group
    ]
    files = sorted((root / "constraints").glob("python*.txt"))
    assert (root / "constraints" / "python3.11.txt") in files
    for path in files:
        pins = dict(line.split("==") for line in path.read_text().split())
        names = {name.lower().replace("_", "-") for name in pins}
        assert set(dependencies) <= names, f"{path.name}: {sorted(set(dependencies) - names)}"
        assert not [v for v in pins.values() if "+" in v], f"{path.name} pins a local version"


def test_notebooks_are_committed_without_outputs(root: Path) -> None:
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), f"{path.name} holds outputs; clear them"
            assert cell.get("execution_count") is None, f"{path.name} holds execution counts"
