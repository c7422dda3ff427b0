"""The rows of a paper run: what is theirs, what they share, and what is refused before the first one begins."""

from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from aptq.config import CONF, compose
from aptq.errors import AptqError
from aptq.paper.published import FIGURE_2, FULL_PRECISION, TABLE_1, TABLE_3
from aptq.paper.rows import rows_of, unfinished
from aptq.run import Run
from aptq.settings import RunSettings

METRICS = {
    "perplexity": {"c4": 40.0, "wikitext2": 50.0},
    "baseline_perplexity": {},
    "bits": {"code": 3.5, "storage": 3.7},
    "bytes": {"model": 1, "original": 2},
    "seconds": {},
    "peak_rss_bytes": 1,
    "peak_device_bytes": None,
    "versions": {},
}


def _config(*more: str, experiment: str = "paper_smollm2") -> DictConfig:
    return compose([f"experiment={experiment}", "model.path=x", *more])


def _few(*more: str, kept: tuple[str, ...] = ("rtn_4", "aptq_75")) -> DictConfig:
    """Return a paper run of few rows: each takes a composition."""
    return _config(*(f"~rows.{name}" for name in _all_rows() if name not in kept), *more)


@cache
def _all_rows() -> tuple[str, ...]:
    return tuple(_config().rows)


def _finish(row: DictConfig) -> None:
    config = OmegaConf.to_container(row, resolve=True)
    with Run.open(RunSettings(dir=row.run.dir), config) as run:  # type: ignore[arg-type]
        run.model_folder.mkdir()
        run.write_metrics(METRICS)
        run.finish()


def test_a_row_is_its_experiment_on_the_model_and_text_of_all() -> None:
    kept = ("rtn_4", "gptq_4", "aptq_75", "manual_blockwise_50_last")
    config = _few("data.num_samples=3", "seed=7", "evaluator.num_sequences=5", kept=kept)
    rows = rows_of(config)
    for name in kept:
        experiment = name.removesuffix("_last")
        single = compose([f"experiment={experiment}", "seed=7"])
        for key in ("hessian", "metric", "quantizer", "measure_bits"):
            assert rows[name][key] == single[key]
        assert rows[name].format.group_size == 128
        assert rows[name].format.clip_steps == 0
        assert rows[name].data == config.data
        assert rows[name].evaluator.num_sequences == 5
        assert rows[name].task == "quantize"
        assert rows[name].run.dir == f"runs/paper_smollm2/{name}"
    assert rows["aptq_75"].allocator.ratio == 0.75
    assert rows["aptq_75"].hessian.seed == 7, "references are to the config of the paper run"
    assert rows["manual_blockwise_50_last"].allocator.keep == "last"
    assert [name for name, row in rows.items() if row.baseline] == ["rtn_4"], "the original is judged once"
    assert not any(row.baseline for row in rows_of(_few("baseline=false")).values())


def test_there_is_a_row_for_every_printed_result_that_is_ours_to_make() -> None:
    printed = {each.row for each in (*TABLE_1, *TABLE_3, *FIGURE_2)} - {None, FULL_PRECISION}
    assert printed | {"rtn_4"} == set(_config(experiment="paper_llama7b").rows)
    for each in FIGURE_2:
        ratio = compose([f"experiment={each.row}"]).allocator.ratio
        assert each.bits == pytest.approx(2 + 2 * ratio), each.label


def test_the_two_differ_in_size() -> None:
    small, large = _config(), _config(experiment="paper_llama7b")
    assert (small.data.num_samples, small.data.sequence_length) == (16, 512)
    assert (large.data.num_samples, large.data.sequence_length) == (128, 2048)
    assert large.rows.items() <= small.rows.items()
    shares = {round(100 * compose([f"experiment={each.row}"]).allocator.ratio) for each in FIGURE_2}
    blocks = [(share, keep) for share in shares - {100} for keep in ("first", "last", "alternating")]
    families = {*(f"aptq_loss_{share}" for share in shares)}
    families |= {f"manual_blockwise_{share}_{keep}" for share, keep in blocks}
    assert families == {name for name in small.rows if name.startswith(("aptq_loss", "manual"))}
    for name in families:
        assert f"_{compose(small.rows[name]).allocator.ratio * 100:.0f}" in name
    assert list(rows_of(large)) == list(large.rows)
    assert (CONF / "experiment" / "paper.yaml").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["hessian=input"], "hessian is set for the whole paper run"),
        (["measure_bits=3"], "measure_bits is set for the whole"),
        (["plan=plan.json"], "plan is set for the whole"),
        (["evaluator=none"], "perplexity"),
        (["evaluator=lm_eval"], "perplexity"),
        (["data=pydoc"], "no text named c4 and wikitext2"),
        (["data=text", "data.path=a", "data.evaluation_path={c4: b}"], "no text named wikitext2"),
        (["data=text", "data.path=a", "data.evaluation_path=b"], "no text named c4"),
        (['rows.aptq_75=["experiment=aptq_75","data.seed=1"]'], "rows.aptq_75: 'data.seed=1' is not a row's to say"),
        (['rows.aptq_75=["experiment=aptq_76"]'], "Unknown experiment 'aptq_76'. Did you mean"),
        (['rows.aptq_75=["experiment=aptq_75","allocator.ratio=2"]'], "ratio=2"),
        (['rows.aptq_75=["experiment=paper"]'], "no run that quantizes"),
        (["rows.aptq_75=aptq_75"], "rows cannot be"),
        (['+rows={a/b: ["experiment=aptq_75"]}'], "'a/b' is to be the name of a folder"),
        (["~rows"], "rows is empty"),
    ],
)
def test_what_cannot_be_is_one_clear_error(more: list[str], message: str) -> None:
    with pytest.raises(AptqError, match=message):
        rows_of(_few(*more))


def test_what_is_the_rows_affair_is_no_key_of_the_paper_run() -> None:
    with pytest.raises(AptqError, match="no section or option 'hessian'"):
        _config("hessian.probes=1")


def test_finished_rows_are_not_run_again(tmp_path: Path) -> None:
    here = f"run.dir={tmp_path}"
    rows = rows_of(_few(here))
    assert list(unfinished(rows)) == list(rows)
    _finish(rows["aptq_75"])
    assert set(rows) - set(unfinished(rows_of(_few(here)))) == {"aptq_75"}
    assert len(unfinished(rows_of(_few(here, "overwrite=true")))) == len(rows)


@pytest.mark.parametrize("change", ["data.num_samples=9", "evaluator.num_sequences=9", "seed=1"])
def test_a_row_that_was_finished_otherwise_is_not_mixed_with_the_others(change: str, tmp_path: Path) -> None:
    _finish(rows_of(_few(f"run.dir={tmp_path}"))["aptq_75"])
    with pytest.raises(AptqError, match=f"row aptq_75 .* another config:\n  {change.partition('=')[0]}"):
        unfinished(rows_of(_few(f"run.dir={tmp_path}", change)))
