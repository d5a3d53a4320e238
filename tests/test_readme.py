import re
import shlex
from pathlib import Path

import pytest
import typer

from sidebench.cli import app

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"^bench [^\n]+", (ROOT / "README.md").read_text("utf-8"), flags=re.M)


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    group = typer.main.get_command(app)
    context = group.make_context("bench", [words[0]], resilient_parsing=True)
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    assert group.make_context(group.name, words, parent=context)  # parses, checks names and types, runs nothing


def test_the_demo_of_the_readme_is_that_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", "")
    made = [" ".join(line.split()) for line in re.findall(r"\$\(BIN\)/(bench [^\n]+)", makefile)]
    assert made
    for command in made:
        assert command in COMMANDS
