"""From a composed config to a run: settings typed, components built, Fabric launched."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from aptq import registry
from aptq.api import Backend, Exporter, Option, Quantizer
from aptq.backends.select import installed_backends
from aptq.basis import chosen_transform
from aptq.benchmark import Benchmark, Result, run_benchmark
from aptq.calibration.embedding import TableCoding
from aptq.callbacks import Callbacks
from aptq.chosen_backends import chosen_backends
from aptq.config import compose, to_settings
from aptq.data import check_data
from aptq.decode_times import DecodeTimes
from aptq.errors import AptqError
from aptq.evaluation import check_tasks, evaluate_model, needs_texts, parts, texts_for
from aptq.files import disk_errors, new_folder, write_bytes, write_json
from aptq.finished import job_of, open_for_use
from aptq.judge import versions
from aptq.metrics_schema import finite
from aptq.models import open_model
from aptq.pipeline import Experiment, quantize_model
from aptq.preflight import check_stores_embedding, check_stores_inputs
from aptq.run import Run
from aptq.settings import DataSettings, ModelSettings, RunSettings
from aptq.targets import fuses, get_target
from aptq.tracking import LoggerCallback
from aptq.typed import convert

_log = logging.getLogger(__name__)


def quantize(config: DictConfig | Sequence[str] = ()) -> Run:
    """Quantize a model as ``aptq`` on the command line does.

    Args:
        config: a composed config (``aptq.compose``), or overrides as on the command line:
            ``["model.path=DIR", "data=text", "data.path=calibration.jsonl", "allocator.ratio=0.5"]``.

    Returns:
        the finished run; ``run.folder / "model"`` loads with transformers.

    Raises:
        AptqError: something that the caller can mend; the message says what.
    """
    composed = config if isinstance(config, DictConfig) else compose(list(config))
    return quantize_model(build_experiment(composed))


def build_experiment(config: DictConfig) -> Experiment:
    """Type the fixed sections, build the components, launch Fabric.

    Raises:
        AptqError: an unknown component, key or value; the message gives the nearest.
    """
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    run = to_settings(RunSettings, plain["run"], "run")
    target = get_target(plain["target"])
    target.check_exporter(plain["exporter"]["name"])
    fabric = launch(plain)
    loggers = [registry.build("logger", plain["logger"], save_dir=Path(run.dir))] if plain.get("logger") else []
    backend = _backend(plain["backend"])
    components = {kind: registry.build(group, plain[group]) for kind, group in _COMPONENTS.items()}
    exporters = _exporters(plain["exporter"])
    chosen = chosen_transform(plain.get("transform") or {}, components["format"], exporters)
    plain["transform"] = chosen  # what is on record says no "auto"
    model = to_settings(ModelSettings, plain["model"], "model")
    return Experiment(
        model=model,
        embedding=_embedding(model, components["quantizer"]),
        data=to_settings(DataSettings, plain["data"], "data"),
        run=run,
        **components,
        exporters=exporters,
        activation=registry.build("activation", plain["activation"]) if plain.get("activation") else None,
        transform=registry.build("transform", chosen) if chosen else None,
        evaluator=registry.build("evaluator", plain["evaluator"]) if plain.get("evaluator") else None,
        target=target,
        decode_times=_decode_times(plain["decode_times"], backend["name"]),
        fused=fuses(target, convert(plain["fused"], bool | None, "fused")),
        backend=backend,
        fabric=fabric,
        callbacks=build_callbacks(plain, fabric, loggers),
        config=plain,
        plan_path=Path(plain["plan"]) if plain["plan"] else None,
        audit=convert(plain["audit"], int, "audit"),
        measure_bits=convert(plain["measure_bits"], int | None, "measure_bits"),
        true_sequential=plain["true_sequential"],
        prefix=plain["prefix"],
        baseline=plain["baseline"],
        num_samples=plain["samples"],
        cache_dir=Path(plain["cache_dir"]).expanduser(),
    )


_COMPONENTS = {
    "estimator": "hessian",
    "metric": "metric",
    "allocator": "allocator",
    "format": "format",
    "quantizer": "quantizer",
}


def _embedding(model: ModelSettings, quantizer: Quantizer) -> TableCoding | None:
    """Return how the input embedding is stored: on an integer grid, whatever the format of the layers is."""
    bits, size = model.quantize_embeddings, model.embedding_group_size
    if bits is None:
        return None
    if not 2 <= bits <= 8:
        raise AptqError(f"model.quantize_embeddings={bits} is not allowed; use 2 to 8 bits, or null for none.")
    if size != -1 and size < 1:
        raise AptqError(f"model.embedding_group_size={size} is not allowed; use -1 (a whole row) or a positive size.")
    config: dict[str, Any] = {"name": "integer", "group_size": size, "symmetric": False, "scale_dtype": "float16"}
    return TableCoding(
        format=registry.build("format", config),
        option=Option(bits, size, config["name"]),
        config=config,
        quantizer=quantizer,
    )


def _exporters(config: Mapping[str, Any]) -> dict[str, Exporter]:
    """Return the native exporter, by the chosen options if it is the chosen one, and that which was chosen."""
    native = {"native": registry.build("exporter", {"name": "native"})}
    return {**native, str(config["name"]): registry.build("exporter", config)}


def launch(config: Mapping[str, Any]) -> Fabric:
    """Start Fabric on the devices that the config asks for."""
    try:
        fabric = Fabric(**config["fabric"])
        fabric.launch()
    except (ValueError, RuntimeError, TypeError) as error:
        raise AptqError(f"fabric={config['fabric']} cannot be had here: {error}") from error
    if fabric.world_size > 1:
        atexit.register(_leave_process_group)
    fabric.seed_everything(config["seed"], verbose=False)
    return fabric


def _leave_process_group() -> None:
    """End what Lightning ends for NCCL alone: gloo's threads abort a process that ends before they do."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_callbacks(config: Mapping[str, Any], fabric: Fabric, loggers: Sequence[Any] = ()) -> Callbacks:
    """Build the chosen callback and the one that feeds the loggers; ranks other than the first are silent."""
    if fabric.global_rank != 0:
        return Callbacks([])
    chosen = [registry.build("callback", config["callback"])] if config.get("callback") else []
    return Callbacks([*chosen, *([LoggerCallback(loggers)] if loggers else [])])


def _decode_times(config: Any, backend: str) -> DecodeTimes | None:
    path = convert(config, Path | None, "decode_times")
    return None if path is None else DecodeTimes.read(path, backend)


def _backend(config: Mapping[str, Any] | str) -> Mapping[str, Any]:
    chosen = {"name": config} if isinstance(config, str) else dict(config)
    if chosen["name"] != "auto":
        registry.build("backend", chosen)  # what is wrong with it is said before any work
    return chosen


def evaluate(config: DictConfig | Sequence[str]) -> dict[str, dict[str, float]]:
    """Judge the model that ``model.path`` names, quantized by aptq or not; ``output`` has the JSON file for it, if any.

    Returns:
        ``{measure: {text or task: value}}``, such as ``{"perplexity": {"c4": 30.1}}``.

    Raises:
        AptqError: something in the config, the data or the model cannot be, or ``output`` is there already.
    """
    composed = config if isinstance(config, DictConfig) else compose(list(config), "evaluate")
    plain: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    output = None if plain["output"] is None else Path(plain["output"])
    if output is not None and output.exists():
        raise AptqError(f"output={output} exists already; remove it or choose another file with output=...")
    if output is not None:
        with disk_errors(output, "the measures"):  # before any work is lost
            output.parent.mkdir(parents=True, exist_ok=True)
    data = to_settings(DataSettings, plain["data"], "data")
    evaluator = registry.build("evaluator", plain["evaluator"])
    check_data(data, calibrate=False, evaluate=needs_texts(evaluator))
    check_tasks(evaluator)
    fabric = launch(plain)
    model, tokenizer = open_for_use(to_settings(ModelSettings, plain["model"], "model"), _backend(plain["backend"]))
    texts = texts_for(evaluator, data, tokenizer)
    with build_callbacks(plain, fabric) as callbacks:
        callbacks.on_stage_start(stage="evaluate", total=len(parts(evaluator, texts)), unit="part")
        measures = evaluate_model(
            evaluator,
            model.to(fabric.device),  # type: ignore[arg-type]  # transformers hides the signature
            tokenizer,
            texts,
            lambda done, name: callbacks.on_advance(stage="evaluate", done=done, detail=name),
        )
    if output is not None and fabric.global_rank == 0:
        record = {**measures, "backends": chosen_backends(model), "versions": versions(), "config": plain}
        write_json(output, finite(record), "the measures")
    return measures


def export(config: DictConfig | Sequence[str]) -> Path:
    """Write a finished run's model by ``exporter`` into ``output``; return that folder."""
    composed = config if isinstance(config, DictConfig) else compose(list(config), "export")
    plain: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    run, output = Run.read(Path(plain["run"])), Path(plain["output"])
    if output.exists():
        raise AptqError(f"output={output} exists already; remove it or choose another with output=...")
    job = job_of(run)
    exporter = registry.build("exporter", plain["exporter"])
    options = sorted(set(job.plan.values()))
    check_stores_inputs(exporter, plain["exporter"]["name"], job.activation_config, job.transform_config)
    check_stores_embedding(exporter, plain["exporter"]["name"], None if job.embedding is None else job.embedding.option)
    exporter.check(job.format, job.format_config["name"], options, shapes=job.shapes, config=job.config)
    with new_folder(output, "the exported model") as draft:
        exporter.export(job, draft)
    return output


def benchmark(config: DictConfig | Sequence[str], on_open: Callable[[Path], None] | None = None) -> Result:
    """Time backends on single layers; ``benchmark.json`` and a figure are written into ``run.dir``.

    ``on_open`` is called with that folder before any work in it.
    """
    composed = config if isinstance(config, DictConfig) else compose(list(config), "benchmark")
    plain: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    settings = to_settings(Benchmark, plain["benchmark"], "benchmark")
    if settings.model is not None:
        source = open_model(ModelSettings(path=settings.model))
        shapes = sorted(set(source.layer_shapes().values()), reverse=True)
        settings = replace(settings, shapes=[list(shape) for shape in shapes])
    format, folder = registry.build("format", plain["format"]), Path(plain["run"]["dir"])
    backends = _named_backends(settings.backends)
    fabric = launch(plain)
    if on_open is not None:
        on_open(folder)
    with build_callbacks(plain, fabric) as callbacks:
        total = len(settings.shapes) * len(settings.options(format, plain["format"]["name"]))
        callbacks.on_stage_start(stage="benchmark", total=total, unit="case")
        found = run_benchmark(
            settings,
            format,
            plain["format"]["name"],
            backends,
            fabric.device,
            lambda done, what: callbacks.on_advance(stage="benchmark", done=done, detail=what),
            plain["seed"],
        )
    from aptq.benchmark.figure import draw  # imports matplotlib: not every run needs it

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "benchmark.json", found.rows, "the benchmark")
    write_bytes(folder / "benchmark.png", draw(found.rows), "a figure")
    return found


def _named_backends(chosen: Sequence[Any] | None) -> dict[str, Backend]:
    """Return the backends to time by name, with their options where they have some."""
    if chosen is None:
        backends, broken = installed_backends()
        for name, reason in broken.items():
            _log.warning("backend %s cannot be used: %s", name, reason)
        return backends
    configs = [{"name": each} if isinstance(each, str) else dict(each) for each in chosen]
    labels = [
        " ".join([str(each.get("name")), *(f"{key}={value}" for key, value in each.items() if key != "name")])
        for each in configs
    ]
    return {label: registry.build("backend", each) for label, each in zip(labels, configs, strict=True)}
