"""The main job: measure, allocate, quantize, export, evaluate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from aptq.api import (
    ActivationQuantizer,
    Allocator,
    Evaluator,
    Exporter,
    ExportJob,
    Format,
    GuidedEstimator,
    HessianEstimator,
    Option,
    Quantizer,
    SensitivityMetric,
    Transform,
)
from aptq.calibration.embedding import STAGE as EMBEDDING
from aptq.calibration.embedding import TableCoding, behind_embedding, steps_of
from aptq.calibration.guidance import STAGE as GRADIENTS
from aptq.calibration.guidance import measure_guidance
from aptq.calibration.quantize import STAGE as QUANTIZE
from aptq.calibration.quantize import Recipe, quantize, stored_logits
from aptq.calibration.statistics import content_key
from aptq.calibration.walk import Walk
from aptq.callbacks import Callbacks
from aptq.data import calibration_samples
from aptq.decode_times import DecodeTimes
from aptq.embedding import PackedEmbedding
from aptq.files import new_folder
from aptq.judge import STAGE as EVALUATE
from aptq.judge import Judge, resources, versions
from aptq.measurement import in_turn, measured
from aptq.models import ModelSource, open_model
from aptq.options import formats_by_name
from aptq.plan import Plan
from aptq.planning import average_bits, budget, make_plan
from aptq.preflight import check_model, preflight
from aptq.run import Run
from aptq.run_folder import EXPORTS
from aptq.settings import DataSettings, ModelSettings, RunSettings
from aptq.stages import Stages
from aptq.targets import Target
from aptq.verify import CHECKED, verify

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Experiment:
    """All that a run is made of: typed settings and built components."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    estimator: HessianEstimator
    metric: SensitivityMetric
    allocator: Allocator
    format: Format
    quantizer: Quantizer
    exporters: Mapping[str, Exporter]  # the native one first; its model is verified, judged and exported anew
    evaluator: Evaluator | None
    target: Target
    backend: Mapping[str, Any]  # name and options, as in the config
    fabric: Fabric
    callbacks: Callbacks
    config: Mapping[str, Any]  # the resolved config, as it is recorded
    activation: ActivationQuantizer | None = None  # what quantizes the layers' inputs
    transform: Transform | None = None  # the basis that weights are rounded in, and inputs quantized
    embedding: TableCoding | None = None  # how the input embedding is stored; None: as it is
    plan_path: Path | None = None
    audit: int = 0  # plans to hold the metric's predictions against
    measure_bits: int | None = None  # of the blocks that pass 1 leaves behind it; None: full precision
    true_sequential: bool = True
    prefix: str = "quantized"
    decode_times: DecodeTimes | None = None
    fused: bool = False  # layers that are run as one share an option
    baseline: bool = True
    num_samples: int = 2  # continuations shown in the report
    cache_dir: Path = field(default_factory=lambda: Path("~/.cache/aptq").expanduser())

    @property
    def format_name(self) -> str:
        """Name of the format, as in the config."""
        return str(self.config["format"]["name"])

    @property
    def formats(self) -> Mapping[str, Format]:
        """Every format that a layer may be stored in, by the name that its options have."""
        return formats_by_name(self.format, self.format_name)

    @property
    def measure_option(self) -> Option | None:
        """What pass 1 rounds each block to once it is measured, if it does."""
        if self.measure_bits is None:
            return None
        name, format = next(iter(self.formats.items()))
        return Option(self.measure_bits, format.group_size, name)


def quantize_model(experiment: Experiment, on_open: Callable[[Path], None] | None = None) -> Run:
    """Run an experiment and return its run folder; an interrupted one is taken up where it stopped.

    ``on_open`` is called with the run folder once it is ours, before any work in it.

    Raises:
        AptqError: something in the config, the data, the model or the run folder cannot be; nothing was lost.
    """
    with experiment.callbacks:
        options, given = preflight(experiment)
        source = open_model(experiment.model)
        options = check_model(experiment, source, options, given)
        if experiment.fabric.global_rank == 0:
            run = _open(experiment)
        experiment.fabric.barrier()
        if experiment.fabric.global_rank != 0:
            run = _open(experiment)
        with run:
            if on_open is not None:
                on_open(run.folder)
            experiment.callbacks.on_run_start(folder=run.folder, config=experiment.config)
            metrics = _run_stages(experiment, source, run, options, given)
            experiment.callbacks.on_run_end(folder=run.folder, metrics=metrics)
    return run


def _open(experiment: Experiment) -> Run:
    return Run.open(experiment.run, experiment.config, rank=experiment.fabric.global_rank)


def _run_stages(
    experiment: Experiment,
    source: ModelSource,
    run: Run,
    options: Sequence[Option],
    given: Plan | None,
) -> dict[str, Any]:
    stages = Stages(experiment.callbacks, experiment.fabric.device)
    if source.resident_reason:
        _log.info("The whole model is held in memory: %s", source.resident_reason)
    samples = calibration_samples(experiment.data, source.tokenizer)
    walk = Walk(source, samples, experiment.data.batch_size, experiment.fabric)
    _guide(experiment, walk, stages)
    plan = run.plan() or _plan(experiment, walk, run, stages, options, given)
    _quantize(experiment, walk, run, stages, plan)
    metrics: dict[str, Any] = {}
    if experiment.fabric.global_rank == 0:
        metrics = _finish(experiment, source, run, stages, plan)
    experiment.fabric.barrier()
    return metrics


def _plan(
    experiment: Experiment, walk: Walk, run: Run, stages: Stages, options: Sequence[Option], given: Plan | None
) -> Plan:
    """Make the plan, or take the given one, and write it down."""
    if given is None:
        planned = make_plan(experiment, walk, stages, options)
        run.save_sensitivity(planned.problem)
        run.save_audit(planned.audit)
        run.save_front(planned.front)
        plan = planned.plan
    else:
        plan = replace(given, budget=budget(experiment, walk.source.layer_shapes(), given.layers))
    run.save_plan(plan)
    return plan


def _guide(experiment: Experiment, walk: Walk, stages: Stages) -> None:
    """Take the gradients that the estimator weighs errors by, if it does."""
    estimator = experiment.estimator
    if not isinstance(estimator, GuidedEstimator) or estimator.labels is None:
        return
    parts = {**measured(experiment, walk), "ranks": experiment.fabric.world_size, "head": walk.source.head_name}
    key = content_key(parts)
    folder = experiment.cache_dir / "gradients" / key
    with in_turn(experiment, key), stages(GRADIENTS, 2 * len(walk.source.block_names), "block"):
        walk.guidance = measure_guidance(walk, estimator, folder, experiment.callbacks)


def _quantize(experiment: Experiment, walk: Walk, run: Run, stages: Stages, plan: Plan) -> None:
    """Run pass 2 and write the model, unless both were done before the run was interrupted."""
    blocks = walk.source.num_steps
    if run.model_folder.is_dir() and all(run.block_done(index) for index in range(blocks)):
        return
    recipe = Recipe(
        estimator=experiment.estimator,
        quantizer=experiment.quantizer,
        format=experiment.format,
        plan=plan.layers,
        costs=plan.layer_costs,
        true_sequential=experiment.true_sequential,
        prefix=experiment.prefix,
        activation=experiment.activation,
        transform=experiment.transform,
    )
    quantized = _behind_embedding(experiment, walk, stages)
    with stages(QUANTIZE, blocks, "block"):
        reports = quantize(walk if recipe.prefix != "quantized" else quantized, recipe, run, experiment.callbacks)
    if experiment.fabric.global_rank == 0:
        run.write_layers_csv(reports)
        with stages("export"):
            _export(experiment, quantized, run, recipe)


def _behind_embedding(experiment: Experiment, walk: Walk, stages: Stages) -> Walk:
    """Return the walk with the embedding as it will be stored."""
    if experiment.embedding is None:
        return walk
    with stages(EMBEDDING, steps_of(walk.source)):
        return behind_embedding(walk, experiment.embedding, experiment.callbacks)


def _export(experiment: Experiment, walk: Walk, run: Run, recipe: Recipe) -> None:
    """Write the model under a temporary name, see that it loads and agrees, then give it its name."""
    # Behind full-precision blocks the walk ends on the original model: the quantized one has to be run for the check.
    # So it has where inputs are quantized: another order of sums would be enough for another code here and there.
    quantized = recipe.prefix == "quantized" and recipe.activation is None
    expected = walk.logits(CHECKED) if quantized else stored_logits(walk.beginning(1, CHECKED), recipe, run)
    coding, found = experiment.embedding, walk.source.embedding
    job = ExportJob(
        plan=recipe.plan,
        shapes=walk.source.layer_shapes(),
        format=experiment.format,
        format_config=experiment.config["format"],
        packed=lambda name: _packed(name, walk, run),
        full_precision=walk.source.other_tensors,
        config=walk.source.config,
        generation_config=walk.source.generation_config,
        tokenizer=walk.source.tokenizer,
        provenance={"versions": versions(), "model": experiment.model.path, "seed": experiment.data.seed},
        activation_config=experiment.config.get("activation") or None,
        transform_config=experiment.config.get("transform") or None,
        embedding=None if coding is None or found is None else coding.of(found),
    )
    (_, native), *others = experiment.exporters.items()
    for name, exporter in others:  # first, so that a run with its model has all
        folder = run.folder / EXPORTS / name
        if not folder.exists():
            with new_folder(folder, "the exported model") as draft:
                exporter.export(job, draft)
    with new_folder(run.model_folder, "the model") as draft:
        native.export(job, draft)
        verify(draft, walk, expected, experiment.backend)


def _packed(name: str, walk: Walk, run: Run) -> Mapping[str, Tensor]:
    """Return what is stored of a layer, or of the embedding, which no block has."""
    module = walk.outside.get(name)
    return module.packed() if isinstance(module, PackedEmbedding) else run.packed(name)


def _finish(experiment: Experiment, source: ModelSource, run: Run, stages: Stages, plan: Plan) -> dict[str, Any]:
    """Judge the result beside the original and write everything down."""
    judged: dict[str, Any] = {"perplexity": {}, "baseline_perplexity": {}}
    if experiment.evaluator is not None:
        with stages(EVALUATE, 2 if experiment.baseline else 1, "model"):
            judge = Judge(experiment.evaluator, experiment.callbacks, experiment.data, source.tokenizer)
            judged = judge(
                run.model_folder,
                source.load_full if experiment.baseline else None,
                backend=experiment.backend,
                device=experiment.fabric.device,
                num_samples=experiment.num_samples,
            )
    audit = run.audit()
    metrics = {
        **judged,
        **({} if audit is None else {"audit": audit}),
        "bits": average_bits(experiment.format, source.layer_shapes(), plan.layers),
        **resources(run.model_folder, source.num_bytes, stages),
    }
    run.write_metrics(metrics)
    run.finish(keep_blocks=experiment.run.keep_blocks)
    return metrics
