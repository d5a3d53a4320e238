import re
import shlex
from pathlib import Path

import pytest
import typer
from outcomes import write_texts

from sidebench.adapters._registry import TABLE, methods_table
from sidebench.bench.compare import compare
from sidebench.bench.outcome import Request
from sidebench.bench.prepare import Inputs
from sidebench.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"^bench [^\n]+", README, flags=re.M)


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
    demo = makefile.partition("\ndemo:")[2].partition("\n\n")[0]
    made = [" ".join(line.split()) for line in re.findall(r"\$\(BIN\)/(bench [^\n]+)", demo)]
    assert made
    for command in made:
        assert command in COMMANDS


def test_the_table_of_methods_is_that_of_the_files() -> None:
    found = TABLE.search(README)
    assert found
    assert found[1] == methods_table(), "run `make methods`"


def test_the_method_of_the_readme_runs(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 30
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(example, "utf-8")
    write_texts(tmp_path / "reviews.jsonl", 60)
    inputs = Inputs(f"hf:{models / 'bert'}", "jsonl:reviews.jsonl", device="cpu")
    request = Request(inputs, ("./mine.py",), {"mine": {"temperature": "0.5"}}, seeds=(0,), epochs=2)
    outcome = compare(request, home=tmp_path, cache_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    (record,) = outcome.records["./mine.py"]
    assert record.error is None
    assert record.measured is not None
    assert record.measured["trainable_params"] == 3 + 2 * 32 + 2  # a score per state, and the head
    assert record.measured["predicted_peak_bytes"] == record.measured["peak_tracked_bytes"]
