"""What can be refused before any work is done: options against each other, and against the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aptq import registry
from aptq.api import (
    ActivationBackend,
    ActivationExporter,
    AptqError,
    DivergenceMetric,
    DriftEstimator,
    EmbeddingExporter,
    Exporter,
    GroupedAllocator,
    LossMetric,
    Option,
    TimedAllocator,
)
from aptq.basis import stores_transforms
from aptq.calibration.quantize import PREFIXES
from aptq.calibration.rounding import needs_drift
from aptq.data import check_data, check_length
from aptq.evaluation import check_tasks, needs_texts
from aptq.fusion import fused_groups
from aptq.options import offered
from aptq.plan import Plan, check_plan, read_plan

if TYPE_CHECKING:
    from aptq.models import ModelSource
    from aptq.pipeline import Experiment


def check_model(
    experiment: Experiment, source: ModelSource, options: Sequence[Option], given: Plan | None
) -> list[Option]:
    """Hold format, target, data and plan against the model's layers; return the options that can be stored.

    Those that a plan names all have to be; of what an allocator may choose among, a format of several may lack some.
    """
    shapes = source.layer_shapes()
    options = _storable(experiment, options, set(shapes.values()), all_of_them=given is not None)
    if experiment.decode_times is not None and given is None:
        experiment.decode_times.of(shapes, options)
    if experiment.measure_option is not None:
        try:
            for shape in set(shapes.values()):
                experiment.format.check(experiment.measure_option, shape)
        except AptqError as error:
            raise AptqError(f"measure_bits={experiment.measure_bits}: {error}") from error
    for width in {in_features for _, in_features in shapes.values()}:
        for each in (experiment.activation, experiment.transform):
            if each is not None:
                each.check(width)
    if experiment.embedding is not None and source.embedding is not None:
        experiment.embedding.check(source.embedding)
    experiment.target.check(options, shapes)
    for exporter in experiment.exporters.values():
        exporter.check(experiment.format, experiment.format_name, options, shapes=shapes, config=source.config)
    check_length(experiment.data, getattr(source.config, "max_position_embeddings", None))
    if given is not None:
        groups = [*given.fused_groups, *(fused_groups(shapes) if experiment.fused else ())]
        check_plan(replace(given, fused_groups=groups), shapes)
    if needs_drift(experiment.quantizer) and source.has_experts:
        raise AptqError(
            f"{_asked_for_drift(experiment)}, and in a mixture of experts the two models send a token to different "
            "layers; use another quantizer."
        )
    return options


def preflight(experiment: Experiment) -> tuple[list[Option], Plan | None]:
    """Check what can be checked without the model; return the options in play and the given plan, if any."""
    check_data(experiment.data, evaluate=needs_texts(experiment.evaluator))
    if experiment.prefix not in PREFIXES:
        raise AptqError(f"prefix={experiment.prefix!r} is not known; use one of {', '.join(PREFIXES)}.")
    if needs_drift(experiment.quantizer):
        _check_drift(experiment)
    if experiment.activation is not None:
        _check_activations(experiment)
    for name, exporter in experiment.exporters.items():
        check_stores_inputs(exporter, name, experiment.config.get("activation"), experiment.config.get("transform"))
        check_stores_embedding(exporter, name, None if experiment.embedding is None else experiment.embedding.option)
    predicts = experiment.plan_path is None and experiment.allocator.needs_costs
    if (
        predicts
        and isinstance(experiment.metric, LossMetric | DivergenceMetric)
        and experiment.measure_bits is not None
    ):
        raise AptqError(
            f"measure_bits={experiment.measure_bits}: metric={experiment.config['metric']['name']} goes by the "
            "full-precision model, and needs its blocks as they are; leave measure_bits out, or use another metric."
        )
    _check_audit(experiment, predicts)
    _check_times(experiment)
    given = None
    if experiment.plan_path is None:
        options = _options(experiment)
    else:
        given = read_plan(experiment.plan_path)
        options = sorted(set(given.layers.values()))
        strange = [option.format for option in options if option.format not in experiment.formats]
        if strange:
            raise AptqError(
                f"The plan {experiment.plan_path} is for format {strange[0]}, the config says "
                f"{' and '.join(experiment.formats)}; add format={strange[0]}, or format=mixed for a plan of several."
            )
    check_tasks(experiment.evaluator)  # the last: it may have to download
    return options, given


def _options(experiment: Experiment) -> list[Option]:
    """Return all that the allocator may choose among, before they are held against the model."""
    allocator = experiment.allocator
    sizes = allocator.group_sizes if isinstance(allocator, GroupedAllocator) else ()
    options = offered(experiment.formats, allocator.bit_options(), sizes)
    if isinstance(allocator, GroupedAllocator):
        allocator.check_options(options)
    elif len(experiment.formats) > 1:
        raise AptqError(
            f"allocator={experiment.config['allocator']['name']} chooses bits only, and the config has the formats "
            f"{', '.join(experiment.formats)}; name one (format=...), or use an allocator that weighs them, such as "
            "knapsack."
        )
    return options


def _storable(
    experiment: Experiment, options: Sequence[Option], shapes: Collection[tuple[int, int]], *, all_of_them: bool
) -> list[Option]:
    """Return the options that their formats can store layers of these shapes at.

    Raises:
        AptqError: what the format says, for a width that is left with no option, or any where all are needed.
    """
    refused: dict[Option, AptqError] = {}
    for option in options:
        try:
            for shape in shapes:
                experiment.format.check(option, shape)
        except AptqError as error:
            refused[option] = error
    left = [option for option in options if option not in refused]
    for option, reason in refused.items():
        if all_of_them or option.bits not in {each.bits for each in left}:
            raise reason
    return left


def _check_times(experiment: Experiment) -> None:
    """Raise ``AptqError`` where time is to be counted and nobody knows it."""
    allocator = experiment.allocator
    if isinstance(allocator, TimedAllocator) and allocator.needs_times and experiment.decode_times is None:
        raise AptqError(
            "allocator.count=time goes by measured times of layers: run aptq -cn benchmark benchmark.model=PATH with "
            "the bits and group sizes in question, and give its table as decode_times=.../benchmark.json."
        )


def _check_activations(experiment: Experiment) -> None:
    """Raise ``AptqError`` where something could not go by quantized inputs."""
    asked = f"activation={experiment.config['activation']['name']}"
    if needs_drift(experiment.quantizer):
        raise AptqError(
            f"{_asked_for_drift(experiment)}, and with {asked} both would be quantized; use another quantizer."
        )
    name = experiment.backend["name"]
    if name != "auto":
        backend = registry.build("backend", experiment.backend)
        if not (isinstance(backend, ActivationBackend) and backend.quantizes_activations):
            raise AptqError(f"backend={name} cannot quantize a layer's inputs, as {asked} asks; use backend=auto.")


def check_stores_inputs(
    exporter: Exporter, name: str, activation: Mapping[str, Any] | None, transform: Mapping[str, Any] | None
) -> None:
    """Raise ``AptqError`` when an exporter cannot say what becomes of a layer's inputs: its readers would not do it."""
    if activation and not (isinstance(exporter, ActivationExporter) and exporter.stores_activations):
        raise AptqError(
            f"exporter={name} cannot store how a layer's inputs are quantized, so its readers would not quantize them; "
            "use exporter=native, or activation=none."
        )
    if transform and not stores_transforms(exporter):
        raise AptqError(
            f"exporter={name} cannot store that a layer's inputs are transformed (transform={transform['name']}), so "
            "its readers would multiply them as they are; use exporter=native, or quantize with transform=none."
        )


def check_stores_embedding(exporter: Exporter, name: str, option: Option | None) -> None:
    """Raise ``AptqError`` when an exporter cannot write an embedding packed at an option; None: it need not."""
    if option is not None and not (isinstance(exporter, EmbeddingExporter) and exporter.stores_embeddings):
        raise AptqError(
            f"exporter={name} cannot store a packed embedding (model.quantize_embeddings={option.bits}), since its "
            "readers know none; use exporter=native, or model.quantize_embeddings=null."
        )


def _check_audit(experiment: Experiment, predicts: bool) -> None:
    """Raise ``AptqError`` where there is nothing to audit."""
    if experiment.audit < 0 or experiment.audit == 1:
        raise AptqError(f"audit={experiment.audit} is not allowed; it is a number of plans from 2 up, or 0 for none.")
    if experiment.audit and not predicts:
        origin = "a given plan" if experiment.plan_path else f"allocator={experiment.config['allocator']['name']}"
        raise AptqError(
            f"audit={experiment.audit} holds what a metric predicts against measured plans, and {origin} predicts "
            "nothing; leave audit out, or use an allocator that goes by costs, such as allocator=knapsack."
        )


def _check_drift(experiment: Experiment) -> None:
    """Raise ``AptqError`` where inputs cannot be compared with the full-precision model's."""
    asked = _asked_for_drift(experiment)
    if experiment.prefix != "quantized":
        raise AptqError(f"{asked}, which with prefix={experiment.prefix} they are; use prefix=quantized.")
    if not experiment.true_sequential:
        raise AptqError(f"{asked} layer by layer; use true_sequential=true.")
    if not (isinstance(experiment.estimator, DriftEstimator) and experiment.estimator.gives_drift):
        raise AptqError(
            f"{asked}, and hessian={experiment.config['hessian']['name']} cannot tell how far they are from them; "
            "use hessian=input."
        )


def _asked_for_drift(experiment: Experiment) -> str:
    return f"quantizer={experiment.config['quantizer']['name']} compares inputs with the full-precision model's"
