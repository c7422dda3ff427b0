"""Components are found by name; unknown, duplicate and broken ones answer with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from aptq import registry
from aptq.errors import AptqError
from aptq.formats.integer import Integer

METRIC = """
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True)
class Metric:
    power: float = 2.0
    mode: Literal["mean", "max"] = "mean"
    widths: tuple[int, ...] = (2, 4)

    def __post_init__(self):
        if self.power < 0:
            raise ValueError("power is negative")

    @property
    def needs_errors(self):
        return False

    def cost(self, layer, option):
        return 0.0
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return ``install(distribution, group, line, source)``: what pip would leave behind for a small plug-in."""

    def make(distribution: str, group: str, line: str, source: str = "") -> None:
        place = tmp_path / distribution
        info = place / f"{distribution}-1.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
        (place / f"{distribution}.py").write_text(source)
        monkeypatch.syspath_prepend(place)

    return make


def test_all_built_ins_are_there_and_work() -> None:
    found = [each for each in registry.describe(check=True) if each.distribution == "aptq"]
    assert {each.kind for each in found} == set(registry.KINDS)
    assert [each for each in found if each.status != "ok"] == []


def test_builds_from_a_name_and_options() -> None:
    built = registry.build("format", {"name": "integer", "group_size": 32, "symmetric": True})
    assert built == Integer(group_size=32, symmetric=True)


def test_builds_from_a_composed_config_and_resolves_it() -> None:
    config = OmegaConf.create({"size": 32, "format": {"name": "integer", "group_size": "${size}"}})
    assert registry.build("format", config.format) == Integer(group_size=32)


def test_a_reference_that_leads_nowhere_is_an_error_of_the_user() -> None:
    config = OmegaConf.create({"name": "integer", "group_size": "${size}"})
    with pytest.raises(AptqError, match="group_size.*size"):
        registry.build("format", config)


def test_does_not_change_the_config() -> None:
    config = {"name": "integer", "group_size": 32}
    registry.build("format", config)
    assert config == {"name": "integer", "group_size": 32}


def test_unknown_name_gives_the_nearest_and_what_is_installed() -> None:
    told = r"Unknown quantizer 'gtpq'\. Did you mean 'gptq'\? Installed: foem, gptaq, gptq, nearest"
    with pytest.raises(AptqError, match=told):
        registry.load("quantizer", "gtpq")


def test_unknown_kind_gives_the_nearest() -> None:
    with pytest.raises(AptqError, match=r"'quantiser'\. Did you mean 'quantizer'\?"):
        registry.available("quantiser")


@pytest.mark.parametrize("config", [{}, {"name": None}, {"group_size": 3}])
def test_a_config_without_a_name_says_what_is_installed(config: dict[str, object]) -> None:
    with pytest.raises(AptqError, match="names none.*integer"):
        registry.build("format", config)


def test_unknown_key_gives_the_nearest_and_all_keys_with_defaults() -> None:
    with pytest.raises(
        AptqError, match=r"format 'integer' has no key 'group_sizes'\. Did you mean 'group_size'\?"
    ) as raised:
        registry.build("format", {"name": "integer", "group_sizes": 32})
    assert "group_size=64" in str(raised.value)
    assert "symmetric=false" in str(raised.value)


def test_wrong_type_names_component_key_and_type() -> None:
    with pytest.raises(AptqError, match=r"format 'integer': group_size cannot be 'many' \(str\).*whole number"):
        registry.build("format", {"name": "integer", "group_size": "many"})


def test_a_plug_in_is_found_with_its_distribution(install: Install) -> None:
    install("plugged", "aptq.metrics", "mine = plugged:Metric", METRIC)
    built = registry.build("metric", {"name": "mine", "power": 3, "widths": [3]})
    assert (built.power, built.widths) == (3.0, (3,))
    assert registry.origin(registry.available("metric")["mine"]) == "plugged 1.5 (plugged:Metric)"


def test_choices_are_checked(install: Install) -> None:
    install("choosy", "aptq.metrics", "mine = choosy:Metric", METRIC)
    with pytest.raises(AptqError, match="metric 'mine': mode cannot be 'meen'.*'mean', 'max'"):
        registry.build("metric", {"name": "mine", "mode": "meen"})


def test_values_that_the_component_refuses(install: Install) -> None:
    install("refusing", "aptq.metrics", "mine = refusing:Metric", METRIC)
    with pytest.raises(AptqError, match="metric 'mine' refuses its options: power is negative"):
        registry.build("metric", {"name": "mine", "power": -1})


def test_a_broken_plug_in_hurts_only_those_who_use_it(install: Install) -> None:
    install("broken", "aptq.metrics", "mine = broken:Metric", "1 / 0")
    assert registry.build("metric", {"name": "trace"}) is not None
    assert "mine" in registry.available("metric")
    with pytest.raises(AptqError, match=r"metric 'mine' from broken 1\.5 \(broken:Metric\).*ZeroDivisionError"):
        registry.load("metric", "mine")


def test_an_object_that_is_missing_in_its_module(install: Install) -> None:
    install("hollow", "aptq.metrics", "mine = hollow:Metric", "")
    with pytest.raises(AptqError, match=r"hollow 1\.5.*AttributeError"):
        registry.load("metric", "mine")


def test_a_name_of_two_distributions_names_both_and_hurts_no_other(install: Install) -> None:
    install("thief", "aptq.metrics", "trace = thief:Metric", METRIC)
    with pytest.raises(AptqError, match="more than once") as raised:
        registry.load("metric", "trace")
    assert "thief 1.5" in str(raised.value)
    assert "aptq 0" in str(raised.value)
    assert registry.build("metric", {"name": "error"}) is not None
    assert {each.status for each in registry.describe() if each.name == "trace"} == {"error"}


def test_says_which_method_is_missing(install: Install) -> None:
    source = "from dataclasses import dataclass\n@dataclass\nclass Metric:\n    needs_errors: bool = False\n"
    install("partial", "aptq.metrics", "mine = partial:Metric", source)
    with pytest.raises(
        AptqError, match=r"partial 1\.5.*is no metric: it has no 'cost' \(see aptq.api.SensitivityMetric\)"
    ):
        registry.build("metric", {"name": "mine"})
    (found,) = [each for each in registry.describe(check=True) if each.name == "mine"]
    assert found.status == "error"
    assert "'cost'" in found.problem


def test_says_when_a_method_is_no_method(install: Install) -> None:
    install("plain", "aptq.metrics", "mine = plain:Metric", "class Metric:\n    needs_errors = False\n    cost = 3\n")
    with pytest.raises(AptqError, match="'cost' cannot be called"):
        registry.build("metric", {"name": "mine"})


def test_a_misspelt_event_of_a_callback_is_told(install: Install) -> None:
    source = "from aptq.api import Callback\nclass Mine(Callback):\n    def on_blok_end(self, **event): pass\n"
    install("misspelt", "aptq.callbacks", "mine = misspelt:Mine", source)
    with pytest.raises(AptqError, match="no event 'on_blok_end'. Did you mean 'on_block_end'"):
        registry.build("callback", {"name": "mine"})


def test_what_the_program_passes_is_no_key_of_the_config(install: Install) -> None:
    source = """
class Logger: pass

def make(folder, level: int = 1):
    logger = Logger()
    logger.at = (folder, level)
    return logger
"""
    install("logging_plugin", "aptq.loggers", "mine = logging_plugin:make", source)
    assert registry.build("logger", {"name": "mine", "level": 2}, folder="here").at == ("here", 2)
    with pytest.raises(AptqError, match=r"has no key 'folder'.*Its keys: level=1\."):
        registry.build("logger", {"name": "mine", "folder": "there"}, folder="here")


def test_other_errors_of_a_plug_in_keep_their_type_and_say_whose_they_are(install: Install) -> None:
    source = "class Metric:\n    def __init__(self):\n        raise OSError('disk')\n"
    install("crashing", "aptq.metrics", "mine = crashing:Metric", source)
    with pytest.raises(OSError, match="disk") as raised:
        registry.build("metric", {"name": "mine"})
    assert "crashing 1.5" in raised.value.__notes__[0]
