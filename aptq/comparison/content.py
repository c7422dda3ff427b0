"""What runs have in common and what not, gathered from their folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from aptq.metrics_schema import Scored, measures, scored
from aptq.run import Run
from aptq.run_folder import differences

_BUDGETS = ("allocator.budget", "allocator.bits", "allocator.ratio")
"""What a curve runs along; runs that differ in nothing else are on one."""


Scores = dict[str, Scored]
"""By measure; perplexity is not among them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    name: str
    settings: dict[str, str]  # what differs between the runs, by dotted key
    curve: str  # label of the curve that the run is on
    code_bits: float
    storage_bits: float
    model_bytes: int
    perplexity: dict[str, float | None]
    scores: Scores
    spearman: float | None
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs, by size."""

    rows: list[Row]
    keys: list[str]  # what differs
    texts: list[str]
    baseline: dict[str, float]  # of the original model, where it is one model and was judged
    baseline_scores: Scores  # likewise
    common: dict[str, str]  # components that all runs have in common

    @property
    def judged(self) -> dict[str, list[str]]:
        """Texts or tasks of every measure but perplexity."""
        found: dict[str, dict[str, None]] = {}
        for row in self.rows:
            for measure, values in row.scores.items():
                found.setdefault(measure, {}).update(dict.fromkeys(values))
        return {measure: list(names) for measure, names in found.items()}

    def best(self, text: str) -> float | None:
        """Return the lowest perplexity on a text."""
        known = [value for row in self.rows if (value := row.perplexity.get(text)) is not None]
        return min(known, default=None)


def collect(runs: Sequence[Run]) -> Comparison:
    """Read finished runs; raise ``AptqError`` for one that is not."""
    metrics = [run.metrics() for run in runs]
    differing = dict.fromkeys(key for run in runs[1:] for key in differences(runs[0].config, run.config))
    sections = list(dict.fromkeys(key.partition(".")[0] for key in differing))
    keys = sorted(
        filter(_is_setting, differing),
        key=lambda key: (sections.index(key.partition(".")[0]), not key.endswith(".name")),  # which, then how
    )
    labels = [key for key in keys if key not in _BUDGETS and not _is_implied(key, differing, runs)]
    rows = [
        Row(
            name=run.folder.name,
            settings={key: _tell(_at(run.config, key)) for key in keys},
            curve=", ".join(f"{key.removesuffix('.name')}={_tell(_at(run.config, key))}" for key in labels),
            code_bits=figures["bits"]["code"],
            storage_bits=figures["bits"]["storage"],
            model_bytes=figures["bytes"]["model"],
            perplexity=figures["perplexity"],
            scores=_scores(figures, original=False),
            spearman=(figures.get("audit") or {}).get("spearman"),
            seconds=sum(figures["seconds"].values()),
            peak_rss_bytes=figures["peak_rss_bytes"],
        )
        for run, figures in zip(runs, metrics, strict=True)
    ]
    baselines = [each["baseline_perplexity"] for each in metrics if each["baseline_perplexity"]]
    scores = [found for each in metrics if (found := _scores(each, original=True))]
    same_model = not any(key.startswith(("model.", "evaluator.", "data.evaluation")) for key in keys)
    components = ("hessian", "metric", "allocator", "format", "quantizer")
    return Comparison(
        rows=sorted(rows, key=lambda row: (row.curve, row.storage_bits)),
        keys=keys,
        texts=list(dict.fromkeys(text for row in rows for text in row.perplexity)),
        baseline=baselines[0] if baselines and same_model else {},
        baseline_scores=scores[0] if scores and same_model else {},
        common={kind: str(_at(runs[0].config, f"{kind}.name")) for kind in components if f"{kind}.name" not in keys},
    )


def _scores(metrics: Mapping[str, Any], original: bool) -> Scores:
    """Return the measures but perplexity that a model was judged by."""
    judged = (measure for measure in measures(metrics) if not original or f"baseline_{measure}" in metrics)
    return {measure: scored(metrics, measure, original) for measure in judged if measure != "perplexity"}


def _is_setting(key: str) -> bool:
    """Leave out what only tells where results go, and whether the original was judged too."""
    return key not in ("baseline", "samples", "overwrite")


def _is_implied(key: str, differing: Iterable[str], runs: Sequence[Run]) -> bool:
    """Say whether an option differs only since the component does: runs of the same one have the same."""
    name = f"{key.partition('.')[0]}.name"
    if key == name or name not in differing:
        return False
    values: dict[str, list[Any]] = {}
    for run in runs:
        values.setdefault(str(_at(run.config, name)), []).append(_at(run.config, key))
    return all(value == mine[0] for mine in values.values() for value in mine)


def _at(config: Any, key: str) -> Any:
    return reduce(
        lambda section, part: section.get(part) if isinstance(section, dict) else None, key.split("."), config
    )


def _tell(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
