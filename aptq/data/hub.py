"""Text from the Hugging Face hub, through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from aptq.data.files import concatenated, text_of
from aptq.errors import AptqError

OPTIONS = ("path", "name", "split", "data_files", "data_dir", "revision", "streaming")


def check_hub(options: Any, key: str) -> None:
    """Raise ``AptqError`` unless the options are those of ``datasets.load_dataset`` and name a path and a split.

    Args:
        options: what the config holds.
        key: where in the config it stands, for messages.
    """
    if not isinstance(options, Mapping) or not options:
        raise AptqError(
            f"{key} is {options!r}. Say what to load, such as {key}={{path: allenai/c4, name: en, split: train}}."
        )
    for option in options:
        if option not in OPTIONS:
            close = get_close_matches(str(option), OPTIONS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise AptqError(f"{key} has no option {option!r}.{hint} Allowed: {', '.join(OPTIONS)}.")
    for option in ("path", "split"):
        if not options.get(option):
            raise AptqError(f"{key} lacks {option!r}. Set {key}.{option}, as datasets.load_dataset takes it.")


def read_hub(options: Mapping[str, Any], field: str) -> Iterator[str]:
    """Yield the text of a data set in pieces: its rows in order, parted by blank lines.

    Rows without text count too, as in the protocol of GPTQ for WikiText-2, whose rows are lines.

    Args:
        options: arguments of ``datasets.load_dataset``.
        field: the column that holds the text.

    Raises:
        AptqError: the data set cannot be loaded or has no such column.
    """
    return concatenated([row] for row in _rows(options, field))


def _rows(options: Mapping[str, Any], field: str) -> Iterator[str]:
    import datasets

    try:
        rows = iter(datasets.load_dataset(**options))
    except Exception as error:
        raise _unreachable(options, error) from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreachable(options, error) from error
        yield text_of(row, field, f"data set {options['path']}")


def _unreachable(options: Mapping[str, Any], error: Exception) -> AptqError:
    # What ``datasets`` raises here comes from four libraries and shares no base class but Exception.
    reason = next(iter(str(error).strip().splitlines()), "no reason given")
    return AptqError(
        f"The data set {options['path']!r} cannot be loaded: {type(error).__name__}: {reason} Check its name, split "
        "and data_files, and the network. Without a network, use text of your own: data=text data.path=FILE "
        "data.evaluation_path=FILE; or what comes with Python: data=pydoc."
    )
