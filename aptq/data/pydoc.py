"""Text that is always there: the topics of Python's own documentation, as ``help()`` shows them.

The split is a function of the topics' names alone: every fourth topic by sorted name judges, the others calibrate.
Topics quote each other at length ("specialnames" contains "customization"), so a paragraph of an evaluation topic is
left out of the calibration text, and a repeated paragraph is kept once. Topics differ between versions of Python, and
figures with them.
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics

EVALUATION_EVERY = 4


def calibration_topics() -> list[str]:
    """Return the topics to calibrate on, by sorted name, without the paragraphs that the evaluation topics have."""
    seen = {paragraph for topic in evaluation_topics() for paragraph in _paragraphs(topic)}
    texts = []
    for index, name in enumerate(sorted(topics)):
        if not _evaluates(index):
            kept = [paragraph for paragraph in dict.fromkeys(_paragraphs(topics[name])) if paragraph not in seen]
            seen.update(kept)
            texts.append("\n\n".join(kept))
    return [text for text in texts if text]


def evaluation_topics() -> list[str]:
    """Return the topics to judge by, by sorted name."""
    names = enumerate(sorted(topics))
    return ["\n\n".join(_paragraphs(topics[name])) for index, name in names if _evaluates(index)]


def _evaluates(index: int) -> bool:
    return index % EVALUATION_EVERY == EVALUATION_EVERY - 1


def _paragraphs(text: str) -> list[str]:
    return [paragraph.rstrip() for paragraph in re.split(r"\n\s*?\n+", text.strip("\n")) if paragraph.strip()]
