"""``aptq plugins`` says what is installed, and fails when a check does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from aptq.plugins_command import main


def _install(folder: Path, distribution: str, entry_points: str, source: str) -> None:
    info = folder / f"{distribution}-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(entry_points)
    (folder / f"{distribution}.py").write_text(source)


def test_lists_components_with_their_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "quantizer" in printed
    assert "gptq" in printed
    assert "aptq 0." in printed


def test_json_goes_to_stdout_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    (row,) = [row for row in rows if (row["kind"], row["name"]) == ("format", "integer")]
    assert row["distribution"] == "aptq"
    assert row["target"] == "aptq.formats.integer:Integer"
    assert row["status"] == "installed"


def test_listing_imports_no_plug_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _install(tmp_path, "sleeper", "[aptq.formats]\nsleeper = sleeper:Format\n", "raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([]) == 0
    assert "sleeper 2.1" in capsys.readouterr().out
    assert "sleeper" not in sys.modules


def test_check_fails_for_a_broken_plug_in_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _install(tmp_path, "breaker", "[aptq.formats]\nbreaker = breaker:Format\n", "raise RuntimeError('boom [red]')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--check", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    (broken,) = [row for row in rows if row["status"] == "error"]
    assert (broken["distribution"], broken["version"]) == ("breaker", "2.1")
    assert "boom [red]" in broken["problem"]
    assert main(["--check"]) == 1
    assert "boom [red]" in capsys.readouterr().out


def test_check_misses_a_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "class Metric:\n    needs_errors = False\n    def cost(self, layer, option): return 0.0\n"
    _install(tmp_path, "fileless", "[aptq.metrics]\nfileless = fileless:Metric\n", source)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--check", "--json"]) == 1
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["status"] == "error"]
    assert "metric/fileless.yaml" in row["problem"]


def test_a_task_of_a_plug_in_is_listed_and_needs_a_primary_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = "[aptq.tasks]\ndistort = distort:run\n[aptq.conf]\ndistort = distort_conf\n"
    _install(tmp_path, "distort", points, "def run(config, on_open):\n    pass\n")
    (tmp_path / "distort_conf").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--check", "--json"]) == 1
    (broken,) = [row for row in json.loads(capsys.readouterr().out) if row["status"] == "error"]
    assert (broken["kind"], broken["name"]) == ("task", "distort")
    assert "aptq -cn distort" in broken["problem"]
    (tmp_path / "distort_conf" / "distort.yaml").write_text("task: distort\n")
    assert main(["--check", "--json"]) == 0


def test_check_misses_a_config_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _install(tmp_path, "folderless", "[aptq.conf]\nfolderless = folderless.conf\n", "")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--check", "--json"]) == 1
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["status"] == "error"]
    assert (row["kind"], row["distribution"]) == ("conf", "folderless")


def test_everything_that_is_installed_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["--nonsense"]])
def test_help_and_unknown_options(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == (0 if argv == ["--help"] else 2)
    assert "aptq plugins" in "".join(capsys.readouterr())
