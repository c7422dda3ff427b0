"""The directions of dependence, and that every component is complete: file, config, entry point, test."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

from aptq.registry import KINDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aptq"
FOLDERS = {f"{kind}s": kind for kind in KINDS if (PACKAGE / f"{kind}s").is_dir()}
"""Folders of components; loggers are functions in one file of their own."""

HELPERS = {"aptq.api", "aptq.errors", "aptq.meaning", "aptq.names", "aptq.packing"}
"""What components may import besides their own package: contracts, errors, functions on tensors, formats and names."""

ALSO = {
    # Native code has no component's name, and its package stands by itself.
    "aptq.backends": {"aptq.kernels.cpu", "aptq.kernels.cpu.ops", "aptq.kernels.operators", "aptq.kernels.triton"},
    "aptq.transforms": {"aptq.kernels.cpu", "aptq.kernels.operators"},
    # The search for the best codes of a trellis is native code.
    "aptq.formats": {"aptq.kernels.cpu", "aptq.kernels.quantiles"},
    # Which module is the attention, and which layers are in it, is read from the model in one place.
    "aptq.hessians": {"aptq.models.structure"},
    # Inputs are rounded by the functions on tensors that weights are rounded by.
    "aptq.activations": {"aptq.formats.block_clusters", "aptq.formats.levels", "aptq.formats.scales"},
    # Writing model folders is the exporters' work; aptq.hf_config says what transformers reads of the native one, and
    # aptq.fusion which layers readers stack.
    "aptq.exporters": {"aptq.files", "aptq.fusion", "aptq.hf_config", "aptq.shards", "aptq.targets"},
}
CHOOSERS = {"aptq.backends.select"}
"""Modules that stand beside components and choose among them: engine, not component."""

OPEN_CONFIGS = {
    *("aptq.cli", "aptq.config", "aptq.config_errors", "aptq.experiment", "aptq.registry"),
    "aptq.paper.rows",
}
"""The edge: only these see OmegaConf or Hydra."""


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
COMPONENTS = {
    name: path
    for name, path in MODULES.items()
    if path.parent.name in FOLDERS and path.parent.parent == PACKAGE and name not in CHOOSERS
}
ENTRY_POINTS = [point for point in distribution("aptq").entry_points if point.group.startswith("aptq.")]


def _imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (
                name if (name := f"{node.module}.{alias.name}") in MODULES else str(node.module) for alias in node.names
            )


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("module", COMPONENTS)
def test_components_import_contracts_and_never_the_engine_or_other_components(module: str) -> None:
    package = module if COMPONENTS[module].name == "__init__.py" else module.rpartition(".")[0]
    named = {point.module for point in ENTRY_POINTS}
    for imported in _imports(COMPONENTS[module]):
        if not _is_in(imported, "aptq") or imported in HELPERS | ALSO.get(package, set()):
            continue
        assert _is_in(imported, package), f"{module} imports {imported}"
        assert imported not in named, f"{module} imports the component {imported}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(COMPONENTS)))
def test_the_engine_imports_no_component(module: str) -> None:
    named = {(point.module, point.attr) for point in ENTRY_POINTS}
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    taken = {(str(node.module), alias.name) for node in froms for alias in node.names} & named
    assert not taken, f"{module} names components; it has to take them from the registry"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"aptq.cli", "aptq.__main__"}))
def test_nothing_imports_the_command_line(module: str) -> None:
    assert not [name for name in _imports(MODULES[module]) if _is_in(name, "aptq.cli")]


@pytest.mark.parametrize("module", sorted(set(MODULES) - OPEN_CONFIGS))
def test_only_the_edge_knows_omegaconf(module: str) -> None:
    assert not [name for name in _imports(MODULES[module]) if name.partition(".")[0] in ("omegaconf", "hydra")]


@pytest.mark.parametrize("point", ENTRY_POINTS, ids=lambda point: f"{point.group}-{point.name}")
def test_a_component_has_its_file_config_and_test(point: object) -> None:
    group, name, module = point.group, point.name, point.module  # type: ignore[attr-defined]
    plural = group.removeprefix("aptq.")
    config = ROOT / "conf" / plural.removesuffix("s") / f"{name}.yaml"
    assert yaml.safe_load(config.read_text())["name"] == name
    if plural in FOLDERS:
        assert module == f"{group}.{name}", "a component lives in the file of its name"
        assert (ROOT / "tests" / plural / f"test_{name}.py").is_file()
    else:
        assert (ROOT / "tests" / f"test_{module.rpartition('.')[2]}.py").is_file()


def test_entry_points_are_sorted_and_installed_as_written() -> None:
    installed = {(point.group, point.name, point.value) for point in ENTRY_POINTS}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written = project["entry-points"]
    assert installed == {(group, name, value) for group, points in written.items() for name, value in points.items()}, (
        "install the package again: pip install -e ."
    )
    for group, points in written.items():
        assert list(points) == sorted(points), group


def test_configs_name_components_and_never_classes() -> None:
    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "plugins").rglob("conf/**/*.yaml")]:
        text = path.read_text()
        assert "_target_" not in text, path
        assert "pkg://" not in text, path


def test_no_component_is_compared_by_name() -> None:
    """A component's name means something to the registry only."""
    groups = {f"aptq.{plural}" for plural in ("allocators", "formats", "quantizers", "hessians", "exporters")}
    names = {point.name for point in ENTRY_POINTS if point.group in groups}
    for module, path in MODULES.items():
        if module in ("aptq.targets", "aptq.hf_config"):  # speak of what other programs call their formats
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                texts = {each.value for each in (node.left, *node.comparators) if isinstance(each, ast.Constant)}
                assert not {text for text in texts if isinstance(text, str)} & names, f"{module}:{node.lineno}"
