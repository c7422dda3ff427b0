"""The package works as a wheel, as an editable install and as a bare checkout, outside of its repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ("aptq-bitdistiller", "aptq-ternary")
PARTS = ("aptq", "conf", "packaging", "plugins", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
AUTOLOAD = "import transformers.quantizers.auto as auto; print('aptq' in auto.AUTO_QUANTIZER_MAPPING)"
COMPOSE = (
    "from aptq.config import CONF, compose; "
    "print(CONF); print(compose(['format=ternary', 'allocator=uniform', 'allocator.bits=2']).format.name)"
)


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command with no trace of this repository in its environment, and return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _pip(environment: Path, *arguments: str | Path, cwd: Path) -> None:
    python = environment / "bin" / "python"
    _run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-build-isolation",
        *arguments,
        cwd=cwd,
    )


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Return a new virtual environment that sees this one's dependencies, but runs none of its ``.pth`` files."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / part).is_file():
            shutil.copy(ROOT / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def wheels(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build a wheel of the package, by way of its source distribution, and one of each plug-in."""
    folder = tmp_path_factory.mktemp("wheels")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=checkout)
    (archive,) = folder.glob("aptq-*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    plugins = (checkout / "plugins" / name for name in PLUGINS)
    for source in (folder / archive.name.removesuffix(".tar.gz"), *plugins):
        _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def _check_installed(environment: Path, outside: Path, conf: Path) -> None:
    rows = json.loads(_run(environment / "bin" / "aptq", "plugins", "--check", "--json", cwd=outside))
    found = {(row["kind"], row["name"]): row for row in rows}
    assert {row["status"] for row in rows} == {"ok"}
    assert found["format", "integer"]["distribution"] == "aptq"
    assert found["format", "ternary"]["distribution"] == "aptq-ternary"
    assert found["task", "bitdistiller"]["distribution"] == "aptq-bitdistiller"
    python = environment / "bin" / "python"
    assert _run(python, "-c", COMPOSE, cwd=outside).split() == [str(conf), "ternary"]
    assert _run(python, "-c", AUTOLOAD, cwd=outside).strip() == "True"


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_configs_and_nothing_else(wheels: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(wheels["aptq"]).namelist())
    assert {"aptq/py.typed", "aptq/conf/quantize.yaml", "aptq/conf/format/integer.yaml", "aptq_autoload.pth"} <= names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"aptq", "aptq_autoload.pth"}
    expected = {f"aptq/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name for name in names if name.startswith("aptq/conf/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheels_work_outside_the_repository(wheels: dict[str, Path], environment: Path, tmp_path: Path) -> None:
    _pip(environment, *wheels.values(), cwd=tmp_path)
    (site,) = (environment / "lib").glob("python*/site-packages")
    _check_installed(environment, tmp_path, site / "aptq" / "conf")


@pytest.mark.slow
def test_editable_installs_work_outside_the_repository(checkout: Path, environment: Path, tmp_path: Path) -> None:
    plugins = [word for name in PLUGINS for word in ("-e", checkout / "plugins" / name)]
    _pip(environment, "-e", checkout, *plugins, cwd=tmp_path)
    _check_installed(environment, tmp_path, checkout / "conf")


@pytest.mark.slow
def test_a_bare_checkout_finds_its_configs(checkout: Path, environment: Path, tmp_path: Path) -> None:
    code = "from aptq.config import CONF, compose; print(CONF); print(compose(['quantizer=nearest']).quantizer.name)"
    printed = _run(environment / "bin" / "python", "-c", code, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert printed.split() == [str(checkout / "conf"), "nearest"]


def _project(path: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads(path.read_text())["project"]
    return project


def test_constraints_pin_all_that_the_package_names() -> None:
    project = _project(ROOT / "pyproject.toml")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["demo"], *extras["dev"]]:
        name = requirement.partition(">=")[0]
        assert name in pins, f"{name} is not pinned in constraints.txt"
    assert pins["torch"] == "2.13.0"
    assert list(pins) == sorted(pins)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plug_in_states_which_versions_it_works_with(name: str) -> None:
    assert "aptq>=0.1,<0.2" in _project(ROOT / "plugins" / name / "pyproject.toml")["dependencies"]


def test_all_plug_ins_are_installed_linted_and_packaged() -> None:
    assert sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()) == list(PLUGINS)
    for file in ("Makefile", ".pre-commit-config.yaml"):
        text = (ROOT / file).read_text()
        assert all(f"plugins/{name}/{name.replace('-', '_')}" in text for name in PLUGINS), file


def test_compromised_releases_of_lightning_are_kept_out() -> None:
    assert "lightning>=2.6.4,<3" in _project(ROOT / "pyproject.toml")["dependencies"]
