"""Where text comes from: files, the hub, or Python's own documentation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from aptq.data.files import check_file, concatenated, find_files, read_text
from aptq.data.hub import check_hub, read_hub
from aptq.data.pydoc import calibration_topics, evaluation_topics
from aptq.errors import AptqError
from aptq.settings import DataSettings

logger = logging.getLogger(__name__)

# The settings that say where text lies, by the source that reads them.
SOURCES: Mapping[str, tuple[str, ...]] = {
    "pydoc": (),
    "text": ("path", "evaluation_path"),
    "hub": ("hub", "evaluation_hub"),
}


def check_data(settings: DataSettings, *, calibrate: bool = True, evaluate: bool) -> None:
    """Check, before a model is loaded, that the text can be read.

    Args:
        settings: what to read.
        calibrate: whether calibration text is needed.
        evaluate: whether evaluation texts are needed too.

    Raises:
        AptqError: an unknown source, a file that is missing, empty, of an unknown kind or without the text field, a
            number that is not positive. A data set of the hub is not contacted.
    """
    _check_source(settings)
    for name in ("num_samples", "sequence_length", "batch_size"):
        value = getattr(settings, name)
        if value < 1:
            raise AptqError(f"data.{name}={value} is not positive. Allowed: whole numbers from 1 on.")
    if settings.source == "text":
        _check_files(settings, calibrate=calibrate, evaluate=evaluate)
    elif settings.source == "hub":
        if calibrate:
            check_hub(settings.hub, "data.hub")
        if evaluate:
            if not settings.evaluation_hub:
                raise AptqError(
                    "Nothing to evaluate on: data.evaluation_hub is empty. Set data.evaluation_hub.NAME to a data set, "
                    "or choose evaluator=none."
                )
            for name, options in settings.evaluation_hub.items():
                check_hub(options, f"data.evaluation_hub.{name}")


def calibration_text(settings: DataSettings) -> Iterator[str]:
    """Return the text to calibrate on, in pieces, in the order of the source."""
    if settings.source == "text":
        files = find_files(settings.path, "data.path")
        return concatenated(read_text(file, settings.text_field) for file in files)
    if settings.source == "hub":
        return read_hub(settings.hub, settings.text_field)
    return concatenated([topic] for topic in calibration_topics())


def evaluation_texts_by_name(settings: DataSettings) -> dict[str, Iterator[str]]:
    """Return every evaluation text by its name, in pieces, in the order of the source."""
    field = settings.text_field
    if settings.source == "text":
        return {
            name: concatenated([read_text(file, field) for file in files])
            for name, files in _evaluation_files(settings).items()
        }
    if settings.source == "hub":
        return {name: read_hub(options, field) for name, options in settings.evaluation_hub.items()}
    return {"pydoc": concatenated([topic] for topic in evaluation_topics())}


def _check_source(settings: DataSettings) -> None:
    if settings.source not in SOURCES:
        close = get_close_matches(str(settings.source), SOURCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise AptqError(f"data.source={settings.source!r} is unknown.{hint} Allowed: {', '.join(SOURCES)}.")
    for source, names in SOURCES.items():
        ignored = [name for name in names if source != settings.source and getattr(settings, name)]
        if ignored:  # silently calibrating on other text than the user named would be the worst answer
            raise AptqError(
                f"data.{ignored[0]} is set, but data.source={settings.source} does not read it. "
                f"Choose data={source}, or leave data.{ignored[0]} out."
            )


def _check_files(settings: DataSettings, *, calibrate: bool, evaluate: bool) -> None:
    calibration: list[Path] = []
    if calibrate:
        if settings.path is None:
            raise AptqError("data.path is not set. Say which text to calibrate on: data.path=FILE_OR_GLOB.")
        calibration = find_files(settings.path, "data.path")
    evaluation: list[Path] = []
    if evaluate:
        if settings.evaluation_path is None:
            raise AptqError(
                "Nothing to evaluate on: data.evaluation_path is not set. Set data.evaluation_path=FILE_OR_GLOB (or "
                "{name: file}), or choose evaluator=none."
            )
        evaluation = [file for files in _evaluation_files(settings).values() for file in files]
    for file in [*calibration, *evaluation]:
        check_file(file, settings.text_field)
    for file in {file.resolve() for file in calibration} & {file.resolve() for file in evaluation}:
        logger.warning("%s is calibrated on and evaluated on: its perplexity will look better than it is.", file)


def _evaluation_files(settings: DataSettings) -> dict[str, list[Path]]:
    paths = settings.evaluation_path
    if isinstance(paths, Mapping):
        if not paths:
            raise AptqError(
                "data.evaluation_path is an empty mapping. Allowed: {name: file}, a file, a glob or a list."
            )
        return {str(name): find_files(path, f"data.evaluation_path.{name}") for name, path in paths.items()}
    files = find_files(paths, "data.evaluation_path")
    return {name: [file] for name, file in zip(_names(files), files, strict=True)}


def _names(files: list[Path]) -> list[str]:
    """Return the files' stems, with as many folders before those that collide as tell them apart."""
    parts = [[*file.absolute().parts[1:-1], file.stem] for file in files]
    counts = [1] * len(files)
    while True:
        names = ["_".join(part[-count:]) for part, count in zip(parts, counts, strict=True)]
        collide = [
            index for index, name in enumerate(names) if names.count(name) > 1 and counts[index] < len(parts[index])
        ]
        if not collide:
            break
        for index in collide:
            counts[index] += 1
    if len(set(names)) < len(names):  # the same folder and stem with two suffixes
        names = [
            "_".join(part[-count:]) + file.suffix.replace(".", "_") if names.count(name) > 1 else name
            for name, part, count, file in zip(names, parts, counts, files, strict=True)
        ]
    return names
