"""The record of the world a run happened in."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidebench import __version__
from sidebench.bench import environment as module
from sidebench.bench.environment import VARIABLES, environment

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def test_the_record_is_json_and_names_the_versions() -> None:
    record = json.loads(json.dumps(environment()))
    assert record["sidebench"] == __version__
    assert record["python"] == platform.python_version()
    assert record["packages"]["torch"] == torch.__version__
    assert record["torch_threads"] == torch.get_num_threads()
    assert record["cpu_count"] >= 1
    assert set(record["variables"]) == set(VARIABLES)


def test_the_record_holds_no_host_no_user_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "a-private-host")
    monkeypatch.setattr("socket.gethostname", lambda: "a-private-host")
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "a-private-user")
    text = json.dumps(environment())
    package_folder = str(Path(module.__file__).resolve().parents[1])
    for private in ("a-private-host", "a-private-user", package_folder, str(Path.home()), sys.prefix):
        assert private not in text


def test_a_package_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-distribution-of-anybody"))
    assert environment()["packages"]["no-such-distribution-of-anybody"] is None


def test_relevant_variables_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    variables = environment()["variables"]
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["MKL_NUM_THREADS"] is None


def test_versions_are_read_without_importing_the_packages() -> None:
    program = (
        "import sys; from sidebench.bench.environment import environment; environment();"
        "print(sorted({'transformers', 'peft', 'zarr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_gpu_is_none_with_a_reason() -> None:
    record = environment()
    assert record["gpu"] is None
    assert record["gpu_driver"] is None
    assert "no CUDA device" in record["gpu_unavailable"]


def _git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    _git(tmp_path, "init", "--quiet")
    (tmp_path / "file.py").write_text("one = 1\n")
    _git(tmp_path, "add", "file.py")
    _git(tmp_path, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(module, "_PACKAGE_ROOT", tmp_path)
    return tmp_path


@needs_git
def test_a_clean_checkout_gives_its_commit(checkout: Path) -> None:
    record = environment()
    assert record["commit"] == _git(checkout, "rev-parse", "HEAD")
    assert record["dirty"] is False
    assert "commit_unavailable" not in record


@needs_git
def test_a_changed_file_makes_the_checkout_dirty(checkout: Path) -> None:
    (checkout / "file.py").write_text("one = 2\n")
    assert environment()["dirty"] is True


@needs_git
def test_another_checkout_named_by_git_dir_is_not_ours(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = _git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))
    assert environment()["commit"] == commit


@needs_git
def test_the_checkout_around_an_installed_package_is_not_ours(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout / "site-packages" / "sidebench"
    installed.mkdir(parents=True)
    monkeypatch.setattr(module, "_PACKAGE_ROOT", installed)
    record = environment()
    assert record["commit"] is None
    assert record["dirty"] is None
    assert "not lie in a git checkout" in record["commit_unavailable"]


@needs_git
def test_a_checkout_without_a_commit_gives_none_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _git(tmp_path, "init", "--quiet")
    monkeypatch.setattr(module, "_PACKAGE_ROOT", tmp_path)
    record = environment()
    assert record["commit"] is None
    assert "rev-parse" in record["commit_unavailable"]
    assert str(tmp_path) not in record["commit_unavailable"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(FileNotFoundError(), "not installed"), (subprocess.TimeoutExpired("git", 5), "in time")],
)
def test_a_failing_git_gives_none_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module, "_PACKAGE_ROOT", tmp_path)
    monkeypatch.setattr(module.subprocess, "run", fail)
    assert reason in environment()["commit_unavailable"]
