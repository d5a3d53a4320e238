"""What is shipped: the package and nothing else, and nothing that would overwrite somebody else's files."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {"__init__.py", "cli.py", "py.typed"}
FOLDERS = {"bench", "cache", "adapters"}

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with what git tracks")


def _run(*words: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _sources() -> set[str]:
    """Files of this checkout that git tracks, or would."""
    listed = _run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    return {name for name in listed if (ROOT / name).exists()}


def _packaged() -> set[str]:
    return {name for name in _sources() if name in TOP or name.partition("/")[0] in FOLDERS}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy without the links that type checkers get."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in _sources():
        if not name.startswith("ns/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").touch()  # pyproject.toml names it
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"sidebench/{name}" for name in _packaged()}


def test_installing_leaves_another_distributions_adapters_untouched(wheel: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("adapters/__init__.py", "OWNER = 'other'\n")
        archive.writestr("bench/__init__.py", "OWNER = 'other'\n")
        archive.writestr("other-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        archive.writestr("other-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("other-1.0.dist-info/RECORD", "")
    target = tmp_path / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target]
    _run(*install, other)
    before = {path.relative_to(target): path.read_bytes() for path in target.rglob("*.py")}
    _run(*install, wheel)
    assert {path: (target / path).read_bytes() for path in before} == before
    added = {path.name for path in target.iterdir()} - {"adapters", "bench", "other-1.0.dist-info"}
    version = wheel.name.split("-")[1]
    assert added == {"sidebench", f"sidebench-{version}.dist-info", "bin"}
    assert {path.name for path in (target / "bin").iterdir()} == {"bench", "sidebench"}


def test_no_other_module_lies_at_the_root_where_it_would_ship() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    folders = {Path(name).parent.as_posix() for name in _packaged() if name.endswith(".py")}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_a_floor_imports_only_floors_below_it() -> None:
    assert "0 broken" in _run(Path(sys.executable).parent / "lint-imports", "--no-cache")
