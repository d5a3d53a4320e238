"""Building: found when it exists, resumed when it died, byte-identical in every case, and refused in a sentence."""

import copy
import dataclasses
import errno
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from sidebench.cache import build as build_module
from sidebench.cache import layout, writer
from sidebench.cache.backbone import Backbone
from sidebench.cache.build import BuildResult, CaptureOptions, Plan, build, plan
from sidebench.cache.errors import SidebenchError
from sidebench.cache.lock import builder_lock
from sidebench.cache.preprocess import ImagePreprocess, PlainImageProcessor
from sidebench.cache.zarr_store import ZarrStore

BATCH = 24  # no divisor of a chunk's 64 rows, so batches straddle chunks
KILL_SECONDS = 60.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least chunk, 64 rows, so that a toy build writes many files."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1)


FORMS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {},
    "text int8 channels views": {"dtype": "int8", "per_channel": True, "views": 1},
    "image fp8 zstd cls+mean": {"dtype": "fp8", "compression": "zstd", "tokens": "cls+mean"},
}
in_every_form = pytest.mark.parametrize("planned", FORMS, indirect=True)


@pytest.fixture(params=["text", "image"])
def planned(request: pytest.FixtureRequest, tiny_bert: Backbone, tiny_vit: Backbone) -> Plan:
    options = CaptureOptions(batch_size=BATCH, **FORMS[request.param])
    if request.param.startswith("text"):
        return plan(tiny_bert, toys.make_texts(100 if options.views else 200), options)
    return plan(tiny_vit, toys.make_images(150), options)


def _run(planned: Plan, cache_dir: Path, **options: Any) -> BuildResult:
    return build(planned, cache_dir, notes={"backbone": "toy"}, **options)


def _bytes(folder: Path) -> dict[str, bytes]:
    return toys.files_of(folder, without=["notes.json"])


def _interrupted(planned: Plan, cache_dir: Path, after: int) -> None:
    """A build that Ctrl-C stops once `after` examples are through."""

    def progress(done: int, total: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(planned, cache_dir, progress=progress)


# Exists, or serves


def test_a_second_call_finds_the_store_and_runs_nothing(planned: Plan, tmp_path: Path) -> None:
    first = _run(planned, tmp_path)
    assert first.status == "built"
    assert first.forward_seconds is not None
    second = _run(planned, tmp_path, progress=lambda *_: pytest.fail("it ran again"))
    assert (second.status, second.folder, second.forward_seconds) == ("exists", first.folder, None)


def test_a_store_that_was_finished_while_we_waited_for_the_lock_is_found(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build_module.builder_lock

    @contextmanager
    def late_lock(folder: Path) -> Iterator[None]:
        monkeypatch.setattr(build_module, "builder_lock", real)
        _run(planned, tmp_path)  # somebody else, between our look and our lock
        with real(folder):
            yield

    monkeypatch.setattr(build_module, "builder_lock", late_lock)
    assert _run(planned, tmp_path).status == "exists"


def test_a_store_of_more_layers_serves_a_call_for_fewer(tiny_bert: Backbone, tmp_path: Path) -> None:
    examples = toys.make_texts(30)
    whole = toys.build_store(tiny_bert, examples, tmp_path)
    fewer = toys.build_store(tiny_bert, examples, tmp_path, layers=("blocks.1",))
    assert (fewer.status, fewer.folder) == ("exists", whole.folder)


def test_a_store_of_fewer_layers_does_not_serve_a_call_for_more(tiny_bert: Backbone, tmp_path: Path) -> None:
    examples = toys.make_texts(30)
    few = toys.build_store(tiny_bert, examples, tmp_path, layers=("blocks.1",))
    whole = toys.build_store(tiny_bert, examples, tmp_path)
    assert whole.status == "built"
    assert whole.folder != few.folder


@in_every_form
def test_two_builds_of_the_same_facts_are_byte_identical(planned: Plan, tmp_path: Path) -> None:
    one, two = _run(planned, tmp_path / "one"), _run(planned, tmp_path / "two")
    assert _bytes(one.folder) == _bytes(two.folder)


# What is stored


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_values_are_the_live_ones_within_the_rounding_of_the_dtype(
    tiny_vit: Backbone, tmp_path: Path, dtype: str
) -> None:
    examples = toys.make_images(40)
    store = ZarrStore(toys.build_store(tiny_vit, examples, tmp_path, dtype=dtype).folder)
    inputs, _ = tiny_vit.preprocess.collate(toys.prepare(tiny_vit, examples))
    live = tiny_vit.capture(inputs, tiny_vit.layers)
    stored = store.read(np.arange(40), store.layers).layers
    half_step = torch.finfo(getattr(torch, dtype)).eps / 2
    for layer in tiny_vit.layers:
        torch.testing.assert_close(stored[layer].float(), live[layer], rtol=half_step + 1e-4, atol=1e-4)


def test_progress_begins_at_zero_and_ends_at_all(planned: Plan, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _run(planned, tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = len(planned.examples)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_size_space_and_time_are_said_before_the_first_batch(planned: Plan, tmp_path: Path) -> None:
    said: list[str] = []
    _run(planned, tmp_path, say=said.append, progress=lambda *_: said.append("batch"))
    assert said[0].startswith(f"cache: {len(planned.examples)} examples x")
    assert "MiB" in said[0]
    assert "about" in said[0]


def test_the_notes_hold_what_is_no_fact(planned: Plan, tmp_path: Path) -> None:
    from sidebench.cache.catalog import read_notes

    notes = read_notes(_run(planned, tmp_path).folder)
    assert notes["backbone"] == "toy"
    assert {"created", "build_seconds", "forward_seconds"} <= set(notes)


def test_a_build_leaves_its_threads_and_temporary_files_behind_nowhere(planned: Plan, tmp_path: Path) -> None:
    folder = _run(planned, tmp_path).folder
    assert not list(folder.rglob("*.partial"))
    assert not [t.name for t in threading.enumerate() if t.name.startswith("sidebench")]


# Dying and resuming


def _in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; 0 when it is through."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def _wait(pid: int) -> int:
    """The exit status of a child (negative: the signal); one that hangs is killed and fails the test."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


def _kill_at_random_moments(planned: Plan, tmp_path: Path, kills: int, seed: int) -> None:
    begun = time.perf_counter()
    whole = _bytes(_run(planned, tmp_path / "whole").folder)
    seconds = time.perf_counter() - begun
    draw = np.random.default_rng(seed)
    killed = 0
    cache_dir = tmp_path / "killed"
    for _ in range(kills):
        pid = _in_child(lambda: _run(planned, cache_dir))
        time.sleep(draw.uniform(0, 2.5 * seconds / kills))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed += _wait(pid) == -signal.SIGKILL
        if killed == 0:  # it was through before its end came: the timed build was a slow one, so aim earlier
            shutil.rmtree(cache_dir)
            seconds /= 4
    assert killed >= 1
    result = _run(planned, cache_dir)
    assert _bytes(result.folder) == whole
    assert ZarrStore(result.folder).verify() == []


@in_every_form
def test_a_build_killed_at_random_moments_resumes_and_ends_byte_identical(planned: Plan, tmp_path: Path) -> None:
    _kill_at_random_moments(planned, tmp_path, kills=4, seed=int(time.time()))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@in_every_form
def test_a_build_killed_fifty_times_resumes_and_ends_byte_identical(planned: Plan, tmp_path: Path, seed: int) -> None:
    _kill_at_random_moments(planned, tmp_path, kills=50, seed=seed)


def _die_at(call: int, moment: str) -> None:
    """Make the `call`-th file of this process its last: before its rename, or right after."""
    real, calls = os.replace, iter(range(10**9))

    def replace(source: Any, target: Any) -> None:
        last = next(calls) == call
        if last and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    writer.os.replace = replace  # in a forked child only


def _kill_at_files(planned: Plan, tmp_path: Path, calls: Iterator[int] | range) -> None:
    whole = _bytes(_run(planned, tmp_path / "whole").folder)
    for call in calls:
        for moment in ("before", "after"):
            cache_dir = tmp_path / f"{call}-{moment}"

            def work(call: int = call, moment: str = moment, cache_dir: Path = cache_dir) -> None:
                _die_at(call, moment)
                _run(planned, cache_dir)

            assert _wait(_in_child(work)) == -signal.SIGKILL
            finished = (call, moment) == (len(whole), "after")  # notes.json, not in `whole`, comes before the manifest
            result = _run(planned, cache_dir)
            assert result.status == "exists" if finished else result.status in ("built", "resumed")
            assert _bytes(result.folder) == whole


@in_every_form
def test_a_build_killed_around_a_rename_resumes_and_ends_byte_identical(planned: Plan, tmp_path: Path) -> None:
    files = len(_bytes(_run(planned, tmp_path / "count").folder)) + 1
    _kill_at_files(planned, tmp_path, iter([0, 5, files // 2, files - 2, files - 1]))


@pytest.mark.long
@in_every_form
def test_a_build_killed_around_every_rename_resumes_and_ends_byte_identical(planned: Plan, tmp_path: Path) -> None:
    files = len(_bytes(_run(planned, tmp_path / "count").folder)) + 1
    _kill_at_files(planned, tmp_path, range(files))


@in_every_form
def test_ctrl_c_keeps_whole_chunks_and_the_next_call_resumes(planned: Plan, tmp_path: Path) -> None:
    whole = _bytes(_run(planned, tmp_path / "whole").folder)
    _interrupted(planned, tmp_path / "cut", after=planned.manifest.items // 2)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("sidebench")]
    result = _run(planned, tmp_path / "cut")
    assert result.status == "resumed"
    assert result.resumed_chunks > 0
    assert _bytes(result.folder) == whole


@pytest.mark.parametrize("pooled_late", [False, True], ids=["small pooled chunks", "one pooled chunk"])
def test_a_resume_repeats_no_forward_of_what_is_on_disk(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooled_late: bool
) -> None:
    """Pooled chunks hold thousands of examples, so they are never on disk when a build dies: they are pooled again."""
    if pooled_late:
        real = layout.ArrayLayout.chunk_rows.fget
        monkeypatch.setattr(
            layout.ArrayLayout,
            "chunk_rows",
            property(lambda self: 1024 if len(self.shape) == 3 and self.shape[1] == 2 else real(self)),
        )
    whole = _bytes(_run(planned, tmp_path / "whole").folder)
    _interrupted(planned, tmp_path / "cut", after=len(planned.examples) - BATCH)
    started: list[int] = []
    result = _run(planned, tmp_path / "cut", progress=lambda done, _: started.append(done))
    assert started[0] >= len(planned.examples) // 2
    assert started[0] % BATCH == 0, "the same examples meet in the same batch"
    assert _bytes(result.folder) == whole


class _Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 8, 4, 4)
        self.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](self.patch(pixels).flatten(2).mT))


def test_rows_that_lie_otherwise_in_memory_are_pooled_to_the_same_bits(tmp_path: Path) -> None:
    """A convolution's tokens come transposed; a mean over them sums in another order than over rows from disk."""
    backbone = Backbone(_Convolution(), ImagePreprocess(PlainImageProcessor(128), 128, None, input_name="pixels"))
    planned = plan(backbone, toys.make_images(150), CaptureOptions(dtype="float32", batch_size=BATCH))
    whole = _bytes(_run(planned, tmp_path).folder)
    folder = tmp_path / planned.manifest.folder_name
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "pooled")
    assert _bytes(_run(planned, tmp_path).folder) == whole


@in_every_form
def test_damaged_and_foreign_leftovers_of_a_dead_build_are_written_again(planned: Plan, tmp_path: Path) -> None:
    whole = _bytes(_run(planned, tmp_path / "whole").folder)
    _interrupted(planned, tmp_path / "cut", after=planned.manifest.items - BATCH)
    folder = tmp_path / "cut" / planned.manifest.folder_name
    one, two, *_ = sorted(p for p in (folder / "layers" / "blocks.0" / "c").rglob("*") if p.is_file())
    one.write_bytes(one.read_bytes()[:-1])
    damaged = bytearray(two.read_bytes())
    damaged[7] ^= 1
    two.write_bytes(damaged)
    (folder / "layers" / "blocks.0" / "zarr.json.partial").write_text("half")
    assert _bytes(_run(planned, tmp_path / "cut").folder) == whole


# Two builders


def test_the_second_builder_is_told_who_holds_the_store(planned: Plan, tmp_path: Path) -> None:
    folder = tmp_path / planned.manifest.folder_name
    reading, writing = os.pipe()

    def hold() -> None:
        with builder_lock(folder):
            os.write(writing, b"!")
            time.sleep(KILL_SECONDS)

    pid = _in_child(hold)
    os.read(reading, 1)
    with pytest.raises(SidebenchError, match=rf"process {pid} is building this cache right now"):
        _run(planned, tmp_path)
    assert not folder.exists()
    os.kill(pid, signal.SIGKILL)
    _wait(pid)
    assert _run(planned, tmp_path).status == "built", "the lock of a dead builder is free"


def test_builders_of_two_stores_do_not_wait_for_each_other(planned: Plan, tmp_path: Path) -> None:
    with builder_lock(tmp_path / "another.zarr"):
        assert _run(planned, tmp_path).status == "built"


# The disk


def test_a_disk_that_is_too_small_is_refused_before_the_store_is_begun(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = planned.manifest.stored_bytes
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda _: usage(10**12, 0, needed - 1))
    with pytest.raises(SidebenchError, match=rf"takes {needed:,} bytes and .* has {needed - 1:,} free.*--layers"):
        _run(planned, tmp_path)
    assert not (tmp_path / planned.manifest.folder_name).exists()


def test_what_is_on_disk_already_counts_as_space(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupted(planned, tmp_path, after=len(planned.examples) - BATCH)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda _: usage(1, 0, planned.manifest.stored_bytes // 2))
    assert _run(planned, tmp_path).status == "resumed"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_up_in_mid_build_loses_nothing(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = _bytes(_run(planned, tmp_path / "whole").folder)
    real, calls = os.fsync, iter(range(10**9))

    def full(handle: int) -> None:
        if next(calls) > len(whole) // 2:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(writer.os, "fsync", full)
    words = "failed: .*Input/output error" if number == errno.EIO else "is full .*What is written is kept"
    with pytest.raises(SidebenchError, match=words):
        _run(planned, tmp_path / "full")
    monkeypatch.setattr(writer.os, "fsync", real)
    result = _run(planned, tmp_path / "full")
    assert result.status == "resumed"
    assert _bytes(result.folder) == whole


def test_a_writer_that_fails_in_an_unforeseen_way_does_not_hang(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise MemoryError("no buffer")

    monkeypatch.setattr(writer, "trailer", broken)
    with pytest.raises(MemoryError, match="no buffer"):
        _run(planned, tmp_path)


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Root may write anywhere, so it steps down."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read-only", "closed"])
@pytest.mark.parametrize("below", [".", "a/new/folder"])
def test_a_cache_folder_that_may_not_be_written_is_one_sentence(planned: Plan, mode: int, below: str) -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(mode)
    try:
        with _as_nobody(), pytest.raises(SidebenchError, match=r"cannot write to .*Permission denied.*--cache-dir"):
            _run(planned, folder / below)
    finally:
        folder.chmod(stat.S_IRWXU)
        os.rmdir(folder)


def test_a_cache_folder_that_is_a_file_is_one_sentence(planned: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SidebenchError, match=r"writing .* failed"):
        _run(planned, tmp_path / "file")


# What cannot be stored


def _spoiled(backbone: Backbone, value: float) -> Backbone:
    """A copy in which the word "joy" is embedded as `value`, wherever it stands."""
    spoiled = copy.deepcopy(backbone)
    joy = toys.WORDS.index("joy") + 4

    def spoil(_: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((kwargs["input_ids"] == joy)[..., None], torch.full_like(output, value), output)

    spoiled.module.embeddings.register_forward_hook(spoil, with_kwargs=True)
    return spoiled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_names_the_layer_and_the_example(tiny_bert: Backbone, tmp_path: Path, value: float) -> None:
    texts = toys.make_texts(40)
    first = next(i for i, text in enumerate(texts.raw) if "joy" in text.split())
    with pytest.raises(SidebenchError, match=rf"layer embeddings, example 'example-{first}': the backbone yields NaN"):
        toys.build_store(_spoiled(tiny_bert, value), texts, tmp_path, dtype="float16")


def test_nan_in_every_token_names_the_first_example_even_where_it_is_padded(
    tiny_bert: Backbone, tmp_path: Path
) -> None:
    broken = copy.deepcopy(tiny_bert)
    with torch.no_grad():
        broken.module.embeddings.LayerNorm.bias.fill_(torch.nan)
    texts = dataclasses.replace(toys.make_texts(3), raw=("good", "good film", "a good film"))
    with pytest.raises(SidebenchError, match=r"layer embeddings, example 'example-0': the backbone yields NaN"):
        toys.build_store(broken, texts, tmp_path)


def test_nan_in_padding_alone_is_nobody_s_business(tiny_bert: Backbone, tmp_path: Path) -> None:
    backbone, texts = copy.deepcopy(tiny_bert), toys.make_texts(40)
    real: list[torch.Tensor] = []
    backbone.module.register_forward_pre_hook(
        lambda _, args, kwargs: real.append(kwargs["attention_mask"].bool()), with_kwargs=True
    )
    backbone.blocks[-1].register_forward_hook(lambda _, args, out: out.masked_fill(~real[-1][..., None], torch.nan))
    spoiled = ZarrStore(toys.build_store(backbone, texts, tmp_path / "spoiled").folder)
    plain = ZarrStore(toys.build_store(tiny_bert, texts, tmp_path / "plain").folder)
    assert torch.equal(spoiled.pooled("blocks.1"), plain.pooled("blocks.1"))


@pytest.mark.parametrize("spoiled", [3, 1], ids=["in the sample", "outside the sample"])
@pytest.mark.parametrize(
    "form",
    [
        {"dtype": "int8"},
        {"dtype": "fp8", "per_channel": True},
        {"dtype": "int8", "per_channel": True, "tokens": "proj:8"},
        {"dtype": "fp8", "tokens": "mean"},
        {"dtype": "bfloat16", "tokens": "first:2"},
        {"dtype": "float16", "tokens": "proj:8", "compression": "zstd"},
    ],
    ids=lambda form: " ".join(map(str, form.values())),
)
def test_nan_names_the_layer_and_the_example_in_every_form(
    tiny_bert: Backbone, tmp_path: Path, form: dict[str, Any], spoiled: int
) -> None:
    """Of 100 examples the sample that errors and channels are taken from holds the fourth and not the second."""
    raw = [text.replace("joy", "fine") for text in toys.make_texts(100).raw]
    raw[spoiled] = "joy " + raw[spoiled]
    texts = dataclasses.replace(toys.make_texts(100), raw=tuple(raw))
    said = rf"layer embeddings, example 'example-{spoiled}': the backbone yields NaN"
    with pytest.raises(SidebenchError, match=said):
        toys.build_store(_spoiled(tiny_bert, float("nan")), texts, tmp_path, **form)
    assert not list(tmp_path.rglob("manifest.json"))


def test_nan_in_a_token_that_is_not_kept_is_nobody_s_business(tiny_bert: Backbone, tmp_path: Path) -> None:
    raw = tuple(f"a {text}" if "joy" in text else text for text in toys.make_texts(40).raw)  # never the first word
    texts = dataclasses.replace(toys.make_texts(40), raw=raw)
    broken = _spoiled(tiny_bert, float("nan"))
    assert toys.build_store(broken, texts, tmp_path, tokens="first:2", layers=("embeddings",)).status == "built"


def test_a_projection_that_overflows_float16_names_the_remedy(tiny_bert: Backbone, tmp_path: Path) -> None:
    """Every activation fits; what is kept of them does not."""
    texts = toys.make_texts(40)
    first = next(i for i, text in enumerate(texts.raw) if "joy" in text.split())
    said = rf"layer embeddings, example 'example-{first}': .* does not fit into float16.*--dtype bfloat16 or float32"
    with pytest.raises(SidebenchError, match=said):
        toys.build_store(
            _spoiled(tiny_bert, 60_000.0), texts, tmp_path, dtype="float16", tokens="proj:8", layers=("embeddings",)
        )


def test_an_overflow_of_float16_names_the_remedy(tiny_bert: Backbone, tmp_path: Path) -> None:
    texts = toys.make_texts(40)
    large = _spoiled(tiny_bert, 70_000.0)
    first = next(i for i, text in enumerate(texts.raw) if "joy" in text.split())
    said = (
        rf"layer embeddings, example 'example-{first}': .* 70000 does not fit into float16.*--dtype bfloat16 or float32"
    )
    with pytest.raises(SidebenchError, match=said):
        toys.build_store(large, texts, tmp_path, dtype="float16", layers=("embeddings",))
    assert toys.build_store(large, texts, tmp_path, dtype="bfloat16", layers=("embeddings",)).status == "built"


def test_a_text_without_a_token_is_refused_by_name(tiny_bert: Backbone) -> None:
    texts = dataclasses.replace(toys.make_texts(3), raw=("good", "", "bad"))
    bare = copy.deepcopy(tiny_bert)
    bare.preprocess.tokenizer.backend_tokenizer.post_processor = _nothing_added()
    with pytest.raises(SidebenchError, match="the text of example 'example-1' holds no token"):
        plan(bare, texts, CaptureOptions())


def _nothing_added() -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="$A", special_tokens=[])


def test_images_for_a_text_backbone_are_refused(tiny_bert: Backbone, tiny_vit: Backbone) -> None:
    with pytest.raises(SidebenchError, match="BertModel reads text, the task holds image"):
        plan(tiny_bert, toys.make_images(3), CaptureOptions())
    with pytest.raises(SidebenchError, match="ViTModel reads image, the task holds text"):
        plan(tiny_vit, toys.make_texts(3), CaptureOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float61"}, "no storage dtype 'float61'. Did you mean 'float16'?"),
        ({"layers": ("blocks.9",)}, "no layer 'blocks.9'"),
        ({"batch_size": 0}, "a batch of 0 examples holds nothing"),
    ],
)
def test_options_that_make_no_store_are_refused(tiny_bert: Backbone, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SidebenchError) as caught:
        plan(tiny_bert, toys.make_texts(3), CaptureOptions(**options))
    assert said in str(caught.value)


def test_an_example_that_cannot_be_read_stops_the_build_with_its_own_words(tiny_vit: Backbone, tmp_path: Path) -> None:
    images = toys.make_images(40)
    images.broken[17] = SidebenchError("picture 17 cannot be read")
    with pytest.raises(SidebenchError, match="picture 17 cannot be read"):
        toys.build_store(tiny_vit, images, tmp_path)
    images.broken.clear()
    assert toys.build_store(tiny_vit, images, tmp_path).folder.exists()
