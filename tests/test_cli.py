"""The command line as a user meets it: help, exit codes, one JSON document, one sentence for what is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
import typer
from outcomes import COMMAND, here, spawning, write_texts
from typer.testing import CliRunner

from sidebench.bench import choice, worker
from sidebench.bench import launch as launching
from sidebench.bench import prepare as preparing
from sidebench.cli import app

Bench = Callable[..., Any]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIDEBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def bench(home: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the command in this process, as if typed in an empty folder."""

    def run(*words: str, **options: Any) -> Any:
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        return CliRunner().invoke(app, words, **options)

    return run


@pytest.fixture
def inputs(models: Path, tmp_path: Path) -> list[str]:
    return ["--backbone", f"hf:{models / 'bert'}", "--task", write_texts(tmp_path / "reviews.jsonl")]


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from _commands(command, (*path, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))


def _refused(result: Any, *parts: str) -> None:
    """Exit code 2, nothing on stdout, and one sentence on stderr, after what was said before."""
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    for part in parts:
        assert part in last


# Help


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_names_every_option_and_what_it_is_for(path: tuple[str, ...], bench: Bench) -> None:
    result = bench(*path, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    command = COMMANDS[path]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{parameter.name} has no help"
        names = [name for name in parameter.opts if name.startswith("-")] or [parameter.metavar or parameter.name]
        assert all(name in result.stdout for name in names)
    for name, inner in getattr(command, "commands", {}).items():
        assert f"  {name} " in result.stdout
        assert inner.help


@pytest.mark.parametrize("path", [p for p, c in COMMANDS.items() if not hasattr(c, "commands")], ids=" ".join)
def test_every_command_takes_json_and_quiet(path: tuple[str, ...]) -> None:
    options = {name for parameter in COMMANDS[path].params for name in parameter.opts}
    assert {"--json", "--quiet"} <= options


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from sidebench.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as done: print('exit', done.code)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'zarr', 'scipy', 'PIL', 'peft'}\n"
        "print('heavy', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["exit 0", "heavy []"]


def test_no_words_at_all_show_the_help(bench: Bench) -> None:
    assert "Usage: " in bench().output


# What is refused


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--methods", "unpit"], ["no method 'unpit'. Did you mean 'unipt'? Known: "]),
        (["--methods", "./mine.py"], ["no method file mine.py"]),
        (["--methods", ","], ["no methods given; name some of "]),
        (
            ["--methods", "unipt", "--set", "unipt.reducton=3"],
            ["no option of unipt 'reducton'. Did you mean 'reduction'?"],
        ),
        (["--methods", "unipt", "--set", "unipt.reduction"], ["--set wants METHOD.KEY=VALUE", "'unipt.reduction'"]),
        (["--methods", "unipt", "--set", "reduction=3"], ["--set wants METHOD.KEY=VALUE", "'reduction=3'"]),
        (
            ["--methods", "unipt", "--set", "lora.rank=3"],
            ["no method in --set 'lora'", "Known: unipt"],
        ),
        (["--methods", "unipt", "--seeds", "0,x"], ["--seeds wants whole numbers", "'0,x'"]),
        (["--methods", "unipt", "--seeds", "-1"], ["--seeds wants numbers from 0", "'-1'"]),
        (["--methods", "unipt", "--seeds", str(2**64)], ["--seeds wants numbers from 0"]),
        (["--methods", "unipt", "--lr", "fast"], ["--lr wants auto, a number", "'fast'"]),
        (["--methods", "linear_probe", "--lr", "0"], ["--lr wants positive numbers"]),
        (["--methods", "unipt", "--precision", "fp16"], ["--precision is fp32 or bf16; found 'fp16'"]),
        (["--methods", "unipt", "--device", "cuda"], ["--device cuda, but this torch sees no CUDA device"]),
        (["--methods", "unipt", "--device", "gpu"], ["no device 'gpu'; wanted auto, cpu, cuda or cuda:0"]),
        (["--methods", "unipt", "--device", "meta"], ["device 'meta' is not supported"]),
        (["--methods", "unipt", "--dtype", "float61"], ["no storage dtype 'float61'. Did you mean 'float16'?"]),
        (["--methods", "unipt", "--limit", "1"], ["limit 1 is less than the 2 classes"]),
        (["--methods", "unipt", "--max-length", "4000"], ["--max-length 4000 is beyond this backbone's 40 positions"]),
        (["--methods", "unipt", "--layers", "blocks.*"], ["--layers keeps blocks.0, blocks.1", "embeddings"]),
        (["--methods", "unipt", "--no-build"], ["--no-build forbids making one", "holds no complete cache"]),
    ],
    ids=lambda value: " ".join(value[2:] or value) if isinstance(value, list) else None,
)
def test_a_wrong_comparison_is_one_sentence(
    words: list[str], parts: list[str], bench: Bench, inputs: list[str]
) -> None:
    if "cuda" in words:
        pytest.importorskip("torch")
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    _refused(bench("compare", *inputs, *words), *parts)


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ("smaple:minilm-l6", ["no backbone scheme 'smaple'. Did you mean 'sample'?"]),
        ("minilm-l6", ["backbone 'minilm-l6' has no scheme in front of a colon"]),
        ("sample:minilm-l5", ["no sample 'minilm-l5'. Did you mean 'minilm-l6'?"]),
        ("hf:./nowhere", ["no transformers model at ./nowhere: looked for "]),
        ("hf:nobody/nothing", ["cannot load the backbone hf:nobody/nothing", "`bench backbones` lists the samples"]),
        ("module:nowhere:make", ["cannot import 'nowhere' for module:nowhere:make"]),
        ("module:nowhere", ["module:nowhere lacks the factory"]),
    ],
)
def test_a_wrong_backbone_is_one_sentence(backbone: str, parts: list[str], bench: Bench, inputs: list[str]) -> None:
    _refused(bench("cache", "build", "--backbone", backbone, *inputs[2:]), *parts)


def test_a_backbone_of_the_other_modality_is_refused(bench: Bench, models: Path, inputs: list[str]) -> None:
    result = bench("cache", "build", "--backbone", f"hf:{models / 'vit'}", *inputs[2:])
    _refused(result, "ViTModel reads image, the task holds text; choose a backbone and a task of one kind")


@pytest.mark.parametrize("pattern", ["blocks.9", "nothing*"])
def test_a_layer_pattern_that_matches_nothing_is_refused(pattern: str, bench: Bench, inputs: list[str]) -> None:
    _refused(
        bench("cache", "build", *inputs, "--layers", pattern), f"no layer '{pattern}'", "Known: blocks.0, blocks.1"
    )


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (b"", ["holds no examples"]),
        (b'{"text": "a film", "label": "x"}\n' * 2, ["holds one class only, 'x'"]),
        (b'{"text": "fine", "label": "x"}\n{"text": "caf\xe9", "label": "y"}\n', ["line 2 is not UTF-8 (byte 0xe9)"]),
        (
            b'{"text": "fine", "label": "x"}\n{"text": "fine", "lable": "y"}\n',
            ["line 2 has no 'label'. Did you mean 'lable'"],
        ),
        (b'{"text": "fine", "label": "x"}\n{"text": "fi', ["line 2 is no valid JSON"]),
    ],
    ids=["empty", "one-class", "not-utf-8", "missing-label", "cut-short"],
)
def test_wrong_rows_are_named_by_file_and_line(
    lines: bytes, parts: list[str], bench: Bench, inputs: list[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(lines)
    result = bench("cache", "build", *inputs[:2], "--task", f"jsonl:{tmp_path / 'bad.jsonl'}")
    _refused(result, str(tmp_path / "bad.jsonl"), *parts)


def test_a_label_that_is_tested_and_never_trained_is_refused(bench: Bench, inputs: list[str], tmp_path: Path) -> None:
    rows = [("train", "x"), ("train", "y"), ("val", "x"), ("test", "z")]
    lines = [json.dumps({"text": "a film", "label": label, "split": part}) for part, label in rows]
    (tmp_path / "parts.jsonl").write_text("\n".join(lines))
    result = bench("cache", "build", *inputs[:2], "--task", f"jsonl:{tmp_path / 'parts.jsonl'}")
    _refused(result, "test has the label 'z', which does not occur in train")


@pytest.mark.parametrize(
    ("task", "part"),
    [
        ("jsnol:x.jsonl", "no task scheme 'jsnol'. Did you mean 'jsonl'?"),
        ("sample:tweet", "no sample task 'tweet'. Did you mean 'tweets'?"),
        ("sample:minilm-l6", "the sample 'minilm-l6' is a backbone"),
        ("csv:nowhere.csv", "there is no file nowhere.csv"),
        ("folder:nowhere", "there is no folder nowhere"),
    ],
)
def test_a_wrong_task_is_one_sentence(task: str, part: str, bench: Bench, inputs: list[str]) -> None:
    _refused(bench("cache", "build", *inputs[:2], "--task", task), part)


def test_an_unreadable_image_is_named(bench: Bench, models: Path, tmp_path: Path) -> None:
    examples = toys.make_images(20)
    for i in range(20):
        folder = tmp_path / "pictures" / ("red" if examples.targets[i] else "blue")
        folder.mkdir(parents=True, exist_ok=True)
        examples.load(i).save(folder / f"{i}.png")
    broken = tmp_path / "pictures" / "blue" / "6.png"
    broken.write_bytes(broken.read_bytes()[:60])
    words = ["--backbone", f"hf:{models / 'vit'}", "--task", f"folder:{tmp_path / 'pictures'}"]
    _refused(bench("cache", "build", *words), f"the image {broken} cannot be read")


@pytest.mark.parametrize("words", [["cache", "build", "--layer", "x"], ["cmopare"], ["compare", "--epochs", "0"]])
def test_an_unknown_option_command_or_number_is_explained_without_a_traceback(words: list[str], bench: Bench) -> None:
    result = bench(*words)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_read_only_cache_folder_is_refused_with_the_way_out(
    bench: Bench, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def mkdir(path: Path, *rest: Any, **options: Any) -> None:
        if path.is_relative_to(tmp_path / "locked"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    result = bench("cache", "build", *inputs, "--cache-dir", str(tmp_path / "locked"))
    _refused(
        result, f"cannot write to {tmp_path / 'locked'}: Read-only file system. Choose another folder with --cache-dir"
    )


def test_a_cache_folder_that_is_a_file_is_refused(bench: Bench, inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    _refused(bench("cache", "build", *inputs, "--cache-dir", str(tmp_path / "file")), str(tmp_path / "file"))


# The cache


@pytest.fixture
def built(bench: Bench, inputs: list[str]) -> dict[str, Any]:
    result = bench("cache", "build", *inputs, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_cache_is_built_found_listed_described_verified_and_removed(
    bench: Bench, inputs: list[str], built: dict[str, Any]
) -> None:
    assert built["status"] == "built"
    assert {"digest", "path", "bytes", "forward_seconds", "write_seconds", "build_seconds", "resumed_chunks"} <= set(
        built
    )
    assert built["layers"] == ["embeddings", "blocks.0", "blocks.1"]
    assert sum(built["examples"].values()) == 60
    again = json.loads(bench("cache", "build", *inputs, "--json").stdout)
    assert (again["status"], again["digest"]) == ("exists", built["digest"])

    (listed,) = json.loads(bench("cache", "ls", "--json").stdout)
    assert {"digest", "path", "backbone", "task", "examples", "bytes", "complete", "created"} <= set(listed)
    assert (listed["digest"], listed["complete"], listed["examples"]) == (built["digest"], True, 60)

    info = json.loads(bench("cache", "info", built["digest"][:8], "--json").stdout)
    assert info["digest"] == built["digest"]
    assert info["facts"]["form"]["dtype"] == "float16"
    assert info == json.loads(bench("cache", "info", built["path"], "--json").stdout)

    verified = bench("cache", "verify", built["digest"][:8], "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout)["ok"] is True
    assert json.loads(verified.stdout)["bad"] == []

    removed = bench("cache", "rm", built["digest"], "--yes", "--json")
    assert removed.exit_code == 0
    assert json.loads(removed.stdout) == {"removed": built["path"]}
    assert json.loads(bench("cache", "ls", "--json").stdout) == []


def test_the_same_without_json_is_text_for_people(bench: Bench, inputs: list[str], built: dict[str, Any]) -> None:
    assert "exists: " in bench("cache", "build", *inputs).stdout
    assert "60" in bench("cache", "ls").stdout
    assert "chunks are as written" in bench("cache", "verify", built["digest"]).stdout
    assert built["digest"] in bench("cache", "info", built["digest"]).stdout
    assert bench("cache", "rm", built["digest"], "--yes").stdout.startswith("removed ")
    assert "no caches in " in bench("cache", "ls").stdout


@pytest.mark.parametrize(
    "where", ["layers/blocks.0/c/0/0", "pooled/blocks.1/c/0/0/0", "targets/c/0", "offsets/c/0", "ids.json"]
)
def test_verify_exits_1_on_a_flipped_byte_and_says_where(where: str, bench: Bench, built: dict[str, Any]) -> None:
    path = Path(built["path"]) / where
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)
    result = bench("cache", "verify", built["digest"], "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["ok"] is False
    (bad,) = found["bad"]
    assert set(bad) == {"layer", "chunk", "reason"}
    assert bad["layer"] in where
    shown = bench("cache", "verify", built["digest"])
    assert (shown.exit_code, bad["reason"] in shown.stdout) == (1, True)


def test_a_truncated_chunk_is_found_by_verify_and_refused_by_nothing_but_a_sentence(
    bench: Bench, built: dict[str, Any]
) -> None:
    path = Path(built["path"]) / "layers/blocks.0/c/0/0"
    path.write_bytes(path.read_bytes()[:-7])
    result = bench("cache", "verify", built["digest"])
    assert result.exit_code == 1
    assert "bytes, wanted" in result.stdout


def test_a_foreign_or_altered_store_is_refused(bench: Bench, built: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "foreign.zarr").mkdir()
    _refused(bench("cache", "info", str(tmp_path / "foreign.zarr")), "is not a complete activation cache")
    _refused(bench("cache", "verify", str(tmp_path / "foreign.zarr")), "is not a complete activation cache")
    _refused(bench("cache", "rm", str(tmp_path / "foreign.zarr"), "--yes"), "nothing was removed")
    assert (tmp_path / "foreign.zarr").is_dir()
    toys.edit_json(Path(built["path"]) / "manifest.json", lambda found: found["facts"]["form"].update(tokens="cls"))
    _refused(bench("cache", "verify", built["digest"]), "manifest.json was altered")


def test_an_unknown_digest_is_refused(bench: Bench, built: dict[str, Any]) -> None:
    for command in ("info", "verify", "rm"):
        _refused(bench("cache", command, "feedbeef"), "no cache in ", "'feedbeef'")


@pytest.mark.parametrize(("answer", "code", "there"), [("y\n", 0, False), ("n\n", 2, True), ("", 2, True)])
def test_rm_asks_unless_told_yes(answer: str, code: int, there: bool, bench: Bench, built: dict[str, Any]) -> None:
    result = bench("cache", "rm", built["digest"], "--json", input=answer)
    assert result.exit_code == code
    assert Path(built["path"]).is_dir() is there
    assert f"Remove {built['path']}?" in result.stderr
    if there:
        assert result.stdout == ""
        assert "nothing was removed; --yes removes without asking" in result.stderr
    else:
        assert json.loads(result.stdout) == {"removed": built["path"]}


def test_messages_go_to_stderr_and_quiet_silences_them(bench: Bench, inputs: list[str]) -> None:
    loud = bench("cache", "build", *inputs, "--json", "--layers", "blocks.0")
    assert json.loads(loud.stdout)["status"] == "built"
    assert "device: " in loud.stderr
    assert "cached 60 of 60 examples" in loud.stderr
    assert "MiB" in loud.stderr  # the size was told beforehand
    quiet = bench("cache", "build", *inputs, "--json", "--quiet", "--layers", "blocks.1")
    assert json.loads(quiet.stdout)["status"] == "built"
    assert quiet.stderr == ""


# Lists


def test_methods_lists_every_option_with_its_default(bench: Bench) -> None:
    found = {row["name"]: row for row in json.loads(bench("methods", "--json").stdout)}
    assert {"linear_probe", "unipt", "lst", "lora", "vpt", "bitfit", "full"} <= set(found)
    for row in found.values():
        assert set(row) >= {"name", "kind", "paper", "summary", "config"}
        assert row["kind"] in ("cached", "prefix", "live")
        assert row["paper"]
        assert all(set(option) >= {"default", "help"} and option["help"] for option in row["config"].values())
    assert found["unipt"]["config"]["reduction"]["default"] == 2
    assert "unipt.reduction=2" in bench("methods").stdout


def test_backbones_and_tasks_list_forms_and_samples(bench: Bench) -> None:
    assert {"sample:minilm-l6", "hf", "module"} <= {
        row["scheme"] for row in json.loads(bench("backbones", "--json").stdout)
    }
    assert {"sample:tweets", "sample:digits"} <= {row["form"] for row in json.loads(bench("tasks", "--json").stdout)}
    assert "sample:dinov2-small" in bench("backbones").stdout
    assert "jsonl:PATH" in bench("tasks").stdout


def test_doctor_says_what_is_there_and_what_is_not(bench: Bench) -> None:
    found = json.loads(bench("doctor", "--json").stdout)
    assert {"python", "torch", "cuda", "nvml", "disk_free_bytes", "cache_dir", "problems", "samples"} <= set(found)
    assert found["disk_free_bytes"] > 0
    assert (found["cuda"] is None) == any("no CUDA device" in problem for problem in found["problems"])
    assert set(found["samples"].values()) == {False}  # an empty home
    assert bench("doctor").stdout.startswith("python: ")


# Comparing


@pytest.fixture
def _runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the jobs of a comparison in this process."""

    def run(job: Any, folder: Path, listener: Any) -> str | None:
        error = here(job, folder, listener)
        if error is not None:
            listener.run_event(job, {"event": "failed", "message": error})
        return error

    monkeypatch.setattr(launching, "spawn", spawning(run))
    monkeypatch.setattr(worker, "emit", lambda *_, **__: None)


QUICK = [
    "--set",
    "linear_probe.candidates=2",
    "--set",
    "linear_probe.max_iterations=60",
    "--epochs",
    "1",
    "--seeds",
    "0",
]


@pytest.mark.usefixtures("_runs_here")
def test_a_comparison_prints_table_verdict_and_report(bench: Bench, inputs: list[str], tmp_path: Path) -> None:
    result = bench("compare", *inputs, "--methods", "linear_probe,unipt", *QUICK)
    assert result.exit_code == 0, result.output
    for shown in ("linear_probe", "unipt", "tracked peak MiB", " linear_probe: ", "after Holm over 1"):
        assert shown in result.stdout
    report = Path(result.stdout.splitlines()[-1].removeprefix("report: "))
    assert report.is_relative_to("runs")
    assert report.read_text("utf-8").startswith("# hf:")


@pytest.mark.usefixtures("_runs_here")
def test_a_comparison_with_json_prints_one_document(bench: Bench, inputs: list[str]) -> None:
    result = bench("compare", *inputs, "--methods", "linear_probe", *QUICK, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["table"]] == ["linear_probe"]
    assert all(Path(path).is_file() for path in [*found["records"], found["report"]])
    assert result.stderr == ""


@pytest.mark.usefixtures("_runs_here")
def test_a_failed_run_is_told_in_the_text_too_and_exits_1(bench: Bench, inputs: list[str]) -> None:
    result = bench("compare", *inputs, "--methods", "linear_probe,unipt", "--lr", "1e30", *QUICK[:-4], "--quiet",
                   "--epochs", "3", "--seeds", "0")  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "unipt failed: the loss is " in result.stdout


@pytest.mark.usefixtures("_runs_here")
def test_a_skipped_method_is_told_in_the_text_too(
    bench: Bench, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "known_methods", lambda: ("linear_probe", "unipt"))
    result = bench("compare", *inputs, "--methods", "all", *QUICK, "--set", "unipt.reduction=1000")
    assert result.exit_code == 0, result.output
    assert "unipt is left out: reduction 1000 leaves no side width of 32" in result.stdout


# Interrupts


def test_ctrl_c_exits_130_with_the_line_that_resumes(
    bench: Bench, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "load_backbone", interrupted)
    result = bench("compare", *inputs, "--methods", "unipt", "--fresh", "--set", "unipt.form=single anchor")
    assert result.exit_code == 2  # the option is wrong, and that is found first
    result = bench("compare", *inputs, "--methods", "unipt", "--fresh", "--runs-dir", "my runs")
    assert result.exit_code == 130
    *_, last = result.stderr.splitlines()
    line = last.partition("To go on: ")[2]
    assert line == f"bench compare {' '.join(inputs)} --methods unipt --runs-dir 'my runs'"  # fresh would begin anew


SLOW_BACKBONE = """
import time
from pathlib import Path
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 4, 1))
    def forward(self, pixels):
        if len(pixels) == 16 and Path("slow").exists():
            Path("slow").rename("begun")
            time.sleep(600)
        return self.blocks(pixels)

def make():
    torch.manual_seed(0)
    return Slow()
"""


def test_ctrl_c_in_a_build_exits_130_and_the_same_command_goes_on(home: Path, tmp_path: Path) -> None:
    (tmp_path / "slowly.py").write_text(SLOW_BACKBONE)
    examples = toys.make_images(40)
    for i in range(40):
        folder = tmp_path / "pictures" / ("red" if examples.targets[i] else "blue")
        folder.mkdir(parents=True, exist_ok=True)
        examples.load(i).save(folder / f"{i}.png")
    (tmp_path / "slow").touch()
    words = ["cache", "build", "--json", "--backbone", "module:slowly:make", "--task", "folder:pictures"]
    words += ["--batch-size", "16", "--image-size", "16", "--device", "cpu"]
    command = [*COMMAND, *words]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1].partition("To go on: bench ")[2]
    assert line.split() == words
    listed = CliRunner().invoke(app, ["cache", "ls", "--json"])
    assert [row["complete"] for row in json.loads(listed.stdout)] == [False]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["status"] in ("built", "resumed")
    first = json.loads(CliRunner().invoke(app, ["cache", "ls", "--json"]).stdout)
    assert [row["complete"] for row in first] == [True]
    shutil.rmtree(home)


def test_a_termination_signal_stops_like_ctrl_c_and_leaves_no_run_behind(
    bench: Bench, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "SIGTERM", signal.SIGUSR1)  # so that a command which ignores it does not end the tests
    usual = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    monkeypatch.setattr(preparing, "load_backbone", lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        result = bench("cache", "build", *inputs)
    finally:
        signal.signal(signal.SIGUSR1, usual)
    assert result.exit_code == 130
    assert "To go on: bench cache build" in result.stderr


def test_a_name_that_the_terminals_encoding_lacks_is_escaped(home: Path) -> None:
    result = CliRunner(charset="ascii").invoke(app, ["cache", "ls", "--cache-dir", "ünï"])
    assert result.exit_code == 0, result.exception
    assert result.stdout == "no caches in \\xfcn\\xef\n"


def test_a_bug_shows_its_traceback(bench: Bench, inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(preparing, "load_backbone", broken)
    with pytest.raises(ZeroDivisionError):
        bench("cache", "build", *inputs, catch_exceptions=False)


def test_the_commands_are_those_of_the_contract() -> None:
    assert {("cache", name) for name in ("build", "ls", "info", "verify", "rm")} <= set(COMMANDS)
    assert {("compare",), ("methods",), ("backbones",), ("tasks",), ("doctor",)} <= set(COMMANDS)
