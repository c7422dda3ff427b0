from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.quantizers import auto

import aptq
import aptq.hf
import aptq.hf_config
from aptq import _autoload

ROOT = Path(__file__).parents[1]
PTH = ROOT / "packaging" / "aptq_autoload.pth"


def run(code: str, *arguments: object, path: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python without its .pth files, so that nothing is registered but by what the code does."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)


def test_importing_aptq_imports_nothing_heavy() -> None:
    code = "import sys, aptq; print(sorted({'torch', 'transformers', 'omegaconf', 'hydra'} & sys.modules.keys()))"
    done = run(code, path=[str(ROOT), *filter(None, sys.path)])
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_aptq_registers_when_transformers_came_first() -> None:
    code = (
        "from transformers.quantizers import auto; assert 'aptq' not in auto.AUTO_QUANTIZER_MAPPING; "
        "import aptq; print(auto.AUTO_QUANTIZER_MAPPING['aptq'].__name__)"
    )
    done = run(code, path=[str(ROOT), *filter(None, sys.path)])
    assert (done.returncode, done.stdout.strip()) == (0, "AptqHfQuantizer"), done.stderr


def test_the_line_for_python_start_is_silent_once_aptq_is_gone(tmp_path: Path) -> None:
    assert PTH.read_text().startswith("import ")
    assert len(PTH.read_text().splitlines()) == 1
    (tmp_path / PTH.name).write_text(PTH.read_text())
    code = "import site, sys; site.addsitedir(sys.argv[1]); assert 'aptq' not in sys.modules"
    done = run(code, tmp_path, path=[], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_registering_again_changes_nothing() -> None:
    finders = list(sys.meta_path)
    _autoload.install()
    _autoload.install()
    assert auto.AUTO_QUANTIZER_MAPPING["aptq"] is aptq.hf.AptqHfQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["aptq"] is aptq.hf_config.AptqConfig
    assert sys.meta_path == finders


def test_a_broken_installation_does_not_break_transformers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "aptq.hf", None)
    with caplog.at_level(logging.WARNING):
        _autoload.install()
    assert "aptq checkpoints cannot be loaded" in caplog.text


def test_public_names_are_loaded_when_used() -> None:
    assert aptq.load is aptq.hf.load
    assert set(aptq.__all__) <= set(dir(aptq))
    assert aptq.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = aptq.nothing  # type: ignore[attr-defined]
