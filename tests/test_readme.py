"""The commands that README, docs and the help text show compose, every word of them."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import aptq

ROOT = Path(__file__).resolve().parents[1]
PRIMARIES = {path.stem for path in (ROOT / "conf").glob("*.yaml")}


def _commands() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    template = yaml.safe_load((ROOT / "conf" / "quantize.yaml").read_text(encoding="utf-8"))["hydra"]["help"][
        "template"
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [re.sub(r"  +[a-z].*", "", line).replace("[", "").replace("]", "") for line in template.splitlines()]
    return [line.partition(" #")[0].strip() for line in lines if re.match(r"aptq( |$)", line)]


@pytest.mark.parametrize(
    "command", sorted({each for each in _commands() if "--help" not in each and "plugins" not in each})
)
def test_a_shown_command_composes(command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    name = "quantize"
    if words[:1] == ["-cn"]:
        name, words = words[1], words[2:]
    if words[:1] == ["-m"]:  # a sweep: any one of its jobs
        words = [re.sub(r"=([^{,]+),.*", r"=\1", word) for word in words[1:]]
    assert name in PRIMARIES
    config = aptq.compose(words, name)
    assert config.task == ("paper" if any(word.startswith("experiment=paper") for word in words) else name)


def test_there_are_commands_to_try() -> None:
    assert len(_commands()) >= 10
