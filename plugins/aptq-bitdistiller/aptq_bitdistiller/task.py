"""``aptq -cn bitdistiller run=...``: a finished run is trained further, and the result is a run again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from aptq import registry
from aptq.api import AptqError, Evaluator, ExportJob
from aptq.calibration.statistics import content_key
from aptq.callbacks import Callbacks
from aptq.config import compose, to_settings
from aptq.data import calibration_samples, check_data
from aptq.evaluation import check_tasks, needs_texts
from aptq.experiment import build_callbacks, launch
from aptq.files import new_folder, write_bytes, write_text
from aptq.finished import job_of
from aptq.hf import load
from aptq.judge import STAGE as EVALUATE
from aptq.judge import Judge, resources
from aptq.layer import PackedLinear
from aptq.models import ModelSource, open_model
from aptq.plan import Plan
from aptq.planning import average_bits
from aptq.report import write_report
from aptq.run import Run
from aptq.settings import DataSettings, ModelSettings, RunSettings
from aptq.stages import Stages
from aptq_bitdistiller.curve import draw, table
from aptq_bitdistiller.student import StudentLinear, enroll, trainable_format
from aptq_bitdistiller.text import Text, TextSettings, generated, given
from aptq_bitdistiller.training import STAGE, Distillation, TrainingSettings, mean_confidence, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
_CHECKPOINTS = "checkpoints"
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    """Everything that is known before any work."""

    origin: Run
    output: Path
    plan: Plan
    quantized: ExportJob
    source: ModelSource
    data: DataSettings
    text: TextSettings
    training: TrainingSettings
    callbacks: Callbacks
    config: Mapping[str, Any]  # of this task, resolved
    record: Mapping[str, Any]  # what the new run's config.yaml says
    device: torch.device


def run(config: DictConfig, on_open: Callable[[Path], None]) -> None:
    """Do the task of the command line; ``on_open`` is told the new run's folder before any work in it."""
    print_summary(distil(config, on_open))


def distil(config: DictConfig | list[str], on_open: Callable[[Path], None] | None = None) -> Run:
    """Train the quantized model of a finished run towards the original, and write it as a run of its own.

    Args:
        config: a composed config, or overrides as on the command line: ``["run=runs/x", "training.steps=200"]``.
        on_open: called with the new run's folder once it is ours, before any work in it.

    Returns:
        the new run; its ``model`` folder is a native checkpoint.

    Raises:
        AptqError: something that the caller can mend; said before any work where it can be known then.
    """
    composed = config if isinstance(config, DictConfig) else compose(list(config), "bitdistiller")
    if OmegaConf.is_missing(composed, "run"):
        raise AptqError("run has no value. Give the folder of a finished run: run=runs/<name>/<id>")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it introduces itself otherwise
    job = _prepare(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]
    settings = RunSettings(dir=str(job.output), overwrite=job.config["overwrite"])
    with job.callbacks, Run.open(settings, job.record) as new:
        if on_open is not None:
            on_open(new.folder)
        checkpoints = new.folder / _CHECKPOINTS
        if not new.resumed:  # those of a run that this one overwrites
            shutil.rmtree(checkpoints, ignore_errors=True)
        job.callbacks.on_run_start(folder=new.folder, config=job.record)
        new.save_plan(job.plan)
        stages = Stages(job.callbacks, job.device)
        if not new.model_folder.is_dir():
            _train(job, new, stages)
        metrics = _judge(job, new, stages)
        new.write_metrics(metrics)
        new.finish()
        shutil.rmtree(checkpoints, ignore_errors=True)
        job.callbacks.on_run_end(folder=new.folder, metrics=metrics)
    write_report(new.folder)
    return new


def _prepare(config: dict[str, Any]) -> _Job:
    """Read the finished run, and say all that can be said against the task."""
    text = to_settings(TextSettings, config["text"], "text")
    training = to_settings(TrainingSettings, config["training"], "training")
    if config["fabric"]["devices"] not in (1, "1") or config["fabric"]["num_nodes"] != 1:
        raise AptqError(
            f"fabric.devices={config['fabric']['devices']}: a student is trained on one device; use fabric.devices=1."
        )
    if config["fabric"]["precision"] not in _PRECISIONS:
        raise AptqError(
            f"fabric.precision={config['fabric']['precision']}: trained weights and scales stay in float32; use one of "
            f"{', '.join(_PRECISIONS)}."
        )
    origin = Run.read(Path(config["run"]))
    output = Path(config["output"] or f"{origin.folder}_distilled")
    quantized, plan = job_of(origin), origin.plan()
    assert plan is not None  # job_of would have raised
    if quantized.embedding is not None:
        raise AptqError(
            f"The run {origin.folder} has a packed embedding (model.quantize_embeddings), which teacher and student "
            "could not share; distil a run without one."
        )
    for option in set(quantized.plan.values()):
        trainable_format(quantized, option)
    data = to_settings(DataSettings, origin.config["data"], "data")
    evaluator = _evaluator(origin)
    check_data(data, evaluate=needs_texts(evaluator))
    check_tasks(evaluator)
    source = open_model(to_settings(ModelSettings, origin.config["model"], "model"))
    longest = getattr(source.config, "max_position_embeddings", None)
    if longest is not None and text.length > longest:
        raise AptqError(f"text.length={text.length} is more than the {longest} positions of the model; set it to less.")
    own = {key: config[key] for key in ("text", "training", "fabric", "logger", "callback", "backend")}
    fabric = launch(config)
    loggers = [registry.build("logger", config["logger"], save_dir=output)] if config["logger"] else []
    return _Job(
        origin=origin,
        output=output,
        plan=plan,
        quantized=quantized,
        source=source,
        data=data,
        text=text,
        training=training,
        callbacks=build_callbacks(config, fabric, loggers),
        config=config,
        record={**origin.config, **own, "distilled_from": str(origin.folder)},
        device=fabric.device,
    )


def _evaluator(origin: Run) -> Evaluator | None:
    """Build what the run was judged by, if it was."""
    section = origin.config.get("evaluator")
    evaluator: Evaluator | None = registry.build("evaluator", section) if section else None
    return evaluator


def _train(job: _Job, new: Run, stages: Stages) -> None:
    """Write or read the text, train, and write the model, its loss curve beside it."""
    model = job.source.load_full().to(job.device)  # type: ignore[arg-type]  # transformers hides the signature
    with stages("generate", job.text.samples, "sample"):
        text = _text(job, model)
    gamma = job.training.share_of_reverse()
    if job.training.loss == "cakld" and gamma is None:
        gamma = mean_confidence(model, text, job.training)
        _log.info("gamma is %.4f: the teacher's mean confidence in the text", gamma)
    activation, transform = job.quantized.activation_config, job.quantized.transform_config
    students = enroll(
        model,
        job.quantized,
        registry.build("activation", activation) if activation else None,
        registry.build("transform", transform) if transform else None,
    )
    module = Distillation(model, students, text, job.training, gamma or 0.0, job.config["seed"])
    with stages(STAGE, job.training.steps, "step"):
        train(module, new.folder / _CHECKPOINTS, job.config["fabric"], job.callbacks)
    write_text(new.folder / "losses.csv", table(module.history), "the losses")
    title = f"Distillation: {job.training.loss}" + (f", gamma {gamma:.3f}" if gamma is not None else "")
    write_bytes(new.folder / "loss.png", draw(module.history, title), "the loss curve")
    _write(job, new, students, {"loss": job.training.loss, "gamma": gamma, "steps": job.training.steps})


def _text(job: _Job, model: PreTrainedModel) -> Text:
    settings = job.text
    length = settings.prompt_length if settings.generate else settings.length
    wanted = replace(job.data, num_samples=settings.samples, sequence_length=length, seed=settings.seed)
    samples = calibration_samples(wanted, job.source.tokenizer)

    def advance(done: int) -> None:
        job.callbacks.on_advance(stage="generate", done=done, detail="the teacher writes")

    if not settings.generate:
        return given(samples)
    parts = {"model": job.source.fingerprint(), "prompts": samples.tolist(), "settings": vars(settings)}
    folder = Path(job.config["cache_dir"]).expanduser() / "generated" / content_key(parts)
    return generated(model, samples, settings, job.source.tokenizer.eos_token_id, folder, advance)


def _write(job: _Job, new: Run, students: Mapping[str, StudentLinear], told: Mapping[str, Any]) -> None:
    """Write the native checkpoint, and give it its name once it holds what was trained."""
    provenance = {**job.quantized.provenance, "distillation": dict(told)}
    trained = replace(job.quantized, packed=lambda name: students[name].packed(), provenance=provenance)
    exporter = registry.build("exporter", {"name": "native"})
    with new_folder(new.model_folder, "the model") as draft:
        exporter.export(trained, draft)
        loaded = dict(load(draft, backend="reference").named_modules())
        for name, student in students.items():
            layer = loaded[name]
            expected = student.format.dequantize(student.quantized(), student.option).cpu()
            if not (isinstance(layer, PackedLinear) and torch.equal(layer.stored(), expected)):
                raise AptqError(f"{name} in the written model is not what was trained: a fault of format or exporter.")


def _judge(job: _Job, new: Run, stages: Stages) -> dict[str, Any]:
    """Return the metrics of the new run; ``perplexity_before`` is that of the run that it began as."""
    before = job.origin.metrics()
    baseline = {name: value for name, value in before.items() if name.startswith("baseline_")}
    judged: dict[str, Any] = {"perplexity": {}, **baseline}
    if (evaluator := _evaluator(job.origin)) is not None:
        with stages(EVALUATE, 1, "model"):
            judge = Judge(evaluator, job.callbacks, job.data, job.source.tokenizer)
            backend = {"name": "auto"} if job.config["backend"] == "auto" else job.config["backend"]
            found = judge(new.model_folder, None, backend=backend, device=job.device, num_samples=0)
        judged |= {name: found[name] for name in found if name not in ("baseline_perplexity", "samples")}
        judged["perplexity_before"] = before["perplexity"]
    return {
        **judged,
        "bits": average_bits(job.quantized.format, job.quantized.shapes, job.quantized.plan),
        **resources(new.model_folder, before["bytes"]["original"], stages),
    }


def print_summary(run: Run) -> None:
    """Print what the training did to each measure, and where the model is."""
    from rich.console import Console

    metrics, console = run.metrics(), Console(soft_wrap=True)
    before = metrics.get("perplexity_before", {})
    for text, value in metrics["perplexity"].items():
        old = before.get(text)
        told = " -> ".join(f"{each:.2f}" if each is not None else "not finite" for each in (old, value))
        console.print(f"perplexity on {text}: {told}", highlight=False)
    console.print(f"Model      [bold]{run.model_folder}[/]", highlight=False)
