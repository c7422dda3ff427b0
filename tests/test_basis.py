"""transform=auto: the preferred basis where the format gains by it and every exporter stores it, none elsewhere."""

from collections.abc import Mapping
from typing import Any

import pytest

from aptq.api import AptqError, Exporter, Format
from aptq.basis import chosen_transform
from aptq.config import compose
from aptq.exporters.gptq import GPTQ
from aptq.exporters.native import Native
from aptq.formats.block_clustered import BlockClustered
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.formats.mixed import Mixed
from aptq.formats.outliers import Outliers

HADAMARD = {"name": "hadamard", "seed": 3}
AUTO = {"name": "auto", "prefer": HADAMARD}


@pytest.mark.parametrize(
    ("format", "gains"),
    [
        (Integer(), True),
        (Float(), True),
        (Float(code="fp"), False),
        (Mixed(formats={"integer": Integer(), "float": Float()}), True),
        (Mixed(formats={"integer": Integer(), "fp": Float(code="fp")}), False),
        (Outliers(inner=Integer()), False),
        (BlockClustered(), False),
    ],
)
def test_auto_is_the_preferred_one_for_formats_that_gain(format: Format, gains: bool) -> None:
    assert chosen_transform(AUTO, format, {"native": Native()}) == (HADAMARD if gains else {})


def test_auto_is_none_where_an_exporter_cannot_store_it() -> None:
    exporters: Mapping[str, Exporter] = {"native": Native(), "gptq": GPTQ()}
    assert chosen_transform(AUTO, Integer(), exporters) == {}


@pytest.mark.parametrize("section", [{}, HADAMARD])
def test_what_is_said_outright_stays(section: dict[str, Any]) -> None:
    assert chosen_transform(section, Outliers(inner=Integer()), {"gptq": GPTQ()}) == section


@pytest.mark.parametrize("section", [{"name": "auto"}, {**AUTO, "seed": 3}, {"name": "auto", "prefer": "hadamard"}])
def test_auto_without_a_preference_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(AptqError, match=r"transform=auto has one key, transform\.prefer.*transform=hadamard"):
        chosen_transform(section, Integer(), {})


def test_the_default_is_auto_and_published_methods_have_none() -> None:
    assert compose().transform == {"name": "auto", "prefer": {"name": "hadamard", "seed": 0}}
    for name in ("aptq_75", "gptq_4", "rtn_4", "afpq_3", "lobcq_w4a4", "vptq_2"):
        assert not compose([f"experiment={name}"]).transform
