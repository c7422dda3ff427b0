"""Pass 1: what a plan is made by. Each part is measured when something asks for it, and cached by content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from aptq.api import (
    DivergenceMetric,
    DraftQuantizer,
    LayerStatistics,
    LossMetric,
    MeasuringAllocator,
    Option,
    PlanJudge,
    Quantizer,
)
from aptq.api.allocation import units_of
from aptq.calibration.guidance import STAGE as GRADIENTS
from aptq.calibration.measure import STAGE as MEASURE
from aptq.calibration.measure import Rounding, measure
from aptq.calibration.plans import PlanMeter
from aptq.calibration.roundings import Roundings
from aptq.calibration.score import score
from aptq.calibration.statistics import StatisticsCache, code_fingerprint, content_key
from aptq.locks import turn

if TYPE_CHECKING:
    from aptq.calibration.walk import Walk
    from aptq.pipeline import Experiment
    from aptq.stages import Stages

AUDIT, DIVERGENCE, SEARCH = "audit", "divergence", "search"
"""Stages that hold plans against the model."""


class Measurement:
    """What pass 1 measures for one experiment; a context manager.

    Inside, the layers' roundings stay on disk for whoever needs them next; they are removed at the end, unless it comes
    by an error: then the run can be taken up again. Processes that measure the same (jobs of a sweep) take turns, so
    that the later ones find what the first one measured.
    """

    def __init__(
        self,
        experiment: Experiment,
        walk: Walk,
        stages: Stages,
        options: Sequence[Option],
        fused: Sequence[Sequence[str]],
    ) -> None:
        self._experiment, self._walk, self._stages = experiment, walk, stages
        self._options, self._fused = options, fused
        metric, prefix = experiment.metric, experiment.measure_option
        quantizer, called = _in_pass_1(experiment)
        self._judges = bool(experiment.audit) or isinstance(experiment.allocator, MeasuringAllocator)
        errors = tuple(options) if metric.needs_errors or self._judges else ()
        config = experiment.config
        rounded = [called, config["format"], config.get("transform"), errors, prefix]
        self._parts = {**measured(experiment, walk), "rounding": rounded if errors or prefix else None}
        self._held = ExitStack()
        self._rounding = Rounding(
            quantizer=quantizer,
            format=experiment.format,
            errors=errors,
            prefix=prefix,
            transform=experiment.transform,
        )
        self._roundings = Roundings(experiment.cache_dir / "roundings" / content_key(self._parts), experiment.fabric)

    def statistics(self) -> Mapping[str, LayerStatistics]:
        """Return what the metric goes by, from the cache where it is known."""
        metric = self._experiment.metric
        if isinstance(metric, LossMetric):
            return self._scored(metric)
        if isinstance(metric, DivergenceMetric):
            return self._each_alone(metric)
        return self._measure(with_roundings=self._judges)

    @contextmanager
    def judge(self, stage: str, samples: int, *, calls: int) -> Iterator[PlanJudge]:
        """Run a stage in which plans are measured, ``calls`` times at most, on the first ``samples``."""
        self._measure(with_roundings=True)
        blocks = self._walk.source.num_steps
        with self._stages(stage, calls * blocks, "block"):
            yield self._meter(samples, None, lambda done, name: self._advance(stage, done * blocks, name))

    def __enter__(self) -> Measurement:
        """Wait for our turn."""
        self._held.enter_context(in_turn(self._experiment, content_key(self._parts)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Remove the roundings, and let others have their turn."""
        with self._held:
            if kind is None:
                self._roundings.remove()

    def _measure(self, *, with_roundings: bool) -> Mapping[str, LayerStatistics]:
        """Observe every layer and round it; only what is not known (and, with roundings, not there) is done."""
        experiment, blocks = self._experiment, self._walk.source.num_steps
        cache = self._cache({})
        if MEASURE in self._stages.seconds and all(map(self._roundings.has, range(blocks))):
            return _filled(cache, self._walk)
        with self._stages(MEASURE, blocks, "block"):
            return measure(
                self._walk,
                experiment.estimator,
                layers=list(self._walk.source.layer_shapes()),
                rounding=self._rounding,
                cache=cache,
                callbacks=experiment.callbacks,
                roundings=self._roundings if with_roundings else None,
            )

    def _scored(self, metric: LossMetric) -> Mapping[str, LayerStatistics]:
        """Run the model backwards over the metric's samples."""
        walk, callbacks = self._walk, self._experiment.callbacks
        cache = self._cache({"loss": [metric.labels, metric.seed, metric.samples, metric.needs_absolute]})
        if (found := cache.load_all(walk.source.num_steps)) is not None:
            return found
        statistics = self._measure(with_roundings=True)
        with self._stages(GRADIENTS, 2 * len(walk.source.block_names), "block"):
            score(
                walk,
                metric,
                statistics,
                coding=self._rounding.coding,
                roundings=self._roundings,
                cache=cache,
                callbacks=callbacks,
                stage=GRADIENTS,
            )
        return _filled(cache, walk)

    def _each_alone(self, metric: DivergenceMetric) -> Mapping[str, LayerStatistics]:
        """Measure the model with one unit rounded at a time: layers of a fused group together."""
        walk, blocks = self._walk, self._walk.source.num_steps
        cache = self._cache({"divergence": [metric.samples, metric.last_tokens, self._fused]})
        if (found := cache.load_all(blocks)) is not None:
            return found
        statistics = self._measure(with_roundings=True)
        with self._stages(DIVERGENCE, blocks, "block"):
            for index, names in enumerate(walk.source.layers_by_step()):
                if cache.load(index) is not None:
                    continue
                rows = self._alone(metric, index, units_of(names, self._fused), statistics)
                if walk.fabric.global_rank == 0:
                    cache.save(index, rows)
        walk.fabric.barrier()  # the first rank writes
        return _filled(cache, walk)

    def _alone(
        self,
        metric: DivergenceMetric,
        index: int,
        units: Sequence[Sequence[str]],
        statistics: Mapping[str, LayerStatistics],
    ) -> list[LayerStatistics]:
        """Measure a block's units; a layer has its share by weights of what its unit does."""
        plans = [dict.fromkeys(unit, option) for unit in units for option in self._options]
        meter = self._meter(
            metric.samples, metric.last_tokens, lambda done, name: self._advance(DIVERGENCE, index + done, name)
        )
        figures = iter(meter(plans))
        rows = []
        for unit in units:
            together = {option: next(figures) for option in self._options}
            weights = sum(statistics[name].num_weights for name in unit)
            for name in unit:
                share = statistics[name].num_weights / weights
                divergences = {option: share * figure for option, figure in together.items()}
                rows.append(replace(statistics[name], divergences=divergences))
        return rows

    def _meter(self, samples: int, last_tokens: int | None, on_block: Callable[[float, str], None]) -> PlanMeter:
        parts = {**self._parts, "plans": [samples, last_tokens], "head": self._walk.source.head_name}
        return PlanMeter(
            self._walk.beginning(samples),
            self._roundings,
            self._rounding.coding,
            path=self._experiment.cache_dir / "plans" / f"{content_key(parts)}.json",
            last_tokens=last_tokens,
            on_block=on_block,
        )

    def _advance(self, stage: str, done: float, name: str) -> None:
        self._experiment.callbacks.on_advance(stage=stage, done=done, detail=name)

    def _cache(self, more: Mapping[str, Any]) -> StatisticsCache:
        return StatisticsCache(self._experiment.cache_dir / "statistics", content_key({**self._parts, **more}))


def _in_pass_1(experiment: Experiment) -> tuple[Quantizer, dict[str, Any]]:
    """Return the quantizer that pass 1 rounds with, and what it is called in a key of the cache.

    Quantizers of one draft measure the same.
    """
    quantizer, config = experiment.quantizer, experiment.config["quantizer"]
    if not isinstance(quantizer, DraftQuantizer):
        return quantizer, config
    draft: Any = quantizer.draft
    if is_dataclass(draft) and not isinstance(draft, type):
        config = {"name": config["name"], **asdict(draft)}
    return draft, config


def _filled(cache: StatisticsCache, walk: Walk) -> Mapping[str, LayerStatistics]:
    found = cache.load_all(walk.source.num_steps)
    if found is None:
        raise RuntimeError(f"{cache.folder / cache.key} was emptied while it was being filled")
    return found


@contextmanager
def in_turn(experiment: Experiment, key: str) -> Iterator[None]:
    """Be the only run on this machine that measures what ``key`` names."""
    with ExitStack() as held:
        if experiment.fabric.local_rank == 0:
            held.enter_context(turn(experiment.cache_dir / "locks" / key, "measuring the same"))
        experiment.fabric.barrier()
        yield
        experiment.fabric.barrier()  # nobody is at it any more


def measured(experiment: Experiment, walk: Walk) -> dict[str, Any]:
    """Return what all that is measured on the calibration samples depends on, for a key of the cache."""
    return {
        "model": walk.source.fingerprint(),
        "code": code_fingerprint(),
        "samples": samples_key(walk),
        "hessian": experiment.config["hessian"],
        "precision": experiment.config["fabric"]["precision"],
    }


def samples_key(walk: Walk) -> str:
    """Return a digest of all calibration samples."""
    return content_key({"shape": list(walk.samples.shape), "tokens": walk.samples.tolist()})
