"""`bench cache …`: build, list, check, take out, bring in and remove activation caches."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cache.errors import SidebenchError
from .options import (
    PLAIN,
    AsJson,
    Backbone,
    CacheDir,
    CaptureSeed,
    Compression,
    Device,
    Dtype,
    ImageSize,
    Layers,
    Limit,
    MaxLength,
    PerChannel,
    Quiet,
    SplitSeed,
    Store,
    Task,
    Tokens,
    Views,
    agreed,
    caches,
    displayed,
    names_of,
    show,
)

if TYPE_CHECKING:
    from ..cache.build import BuildResult

cache_app = typer.Typer(help="Build, list, check and remove activation caches.", **PLAIN)


@cache_app.command("build")
def cache_build(
    backbone: Backbone,
    task: Task,
    layers: Layers = None,
    dtype: Dtype = "float16",
    tokens: Tokens = "all",
    per_channel: PerChannel = False,
    compression: Compression = None,
    views: Views = 0,
    seed: CaptureSeed = 0,
    image_size: ImageSize = None,
    max_length: MaxLength = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per frozen forward; part of the digest.")] = 64,
    limit: Limit = None,
    split_seed: SplitSeed = 0,
    device: Device = "auto",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that build; the store is the same for any number.")
    ] = 1,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the frozen backbone once over a task and keep its activations; finds or resumes an earlier build."""
    from ..cache.build import CaptureOptions
    from ..cache.home import home
    from .build_workers import LocalWorkers
    from .prepare import Inputs, build_store, plan_store, prepare
    from .tasks.split import split

    inputs = Inputs(backbone, task, image_size, max_length, limit, device)
    with displayed(quiet) as display:
        prepared = prepare(inputs, home=home(), cache_dir=caches(cache_dir), say=display.say)
        sizes = split(prepared.task, split_seed).sizes()
        where = home()
        capture = CaptureOptions(names_of(layers), dtype, batch_size, tokens, per_channel, compression, views, seed)
        planned = {name: plan_store(tower, capture) for name, tower in prepared.towers.items()}
        built = {}
        for name, tower in prepared.towers.items():
            local = LocalWorkers(workers, tower, planned[name], where)
            built[name] = build_store(tower, planned[name], progress=display.examples, say=display.say, workers=local)
    found = {name: _built(result) for name, result in built.items()}
    document: dict[str, Any] = {**found[""], "examples": sizes} if "" in found else _together(found, sizes)
    lines = [f"{one['status']}{_took(one)}: {one['path']} ({one['bytes']:,} bytes)" for one in found.values()]
    show(document, as_json, "\n".join(lines))


def _built(result: "BuildResult") -> dict[str, Any]:
    """What `--json` says of a store."""
    from ..cache.catalog import read_notes

    return {
        "status": result.status,
        "digest": result.manifest.digest,
        "path": str(result.folder),
        "layers": list(result.manifest.layers),
        "bytes": result.bytes,
        "forward_seconds": result.forward_seconds,
        "write_seconds": result.write_seconds,
        "build_seconds": result.build_seconds,
        "resumed_chunks": result.resumed_chunks,
        "relative_errors": read_notes(result.folder).get("relative_errors") or {},
    }


def _together(found: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """What it says of the stores of several streams: each, and their sums. `status`: of the one that took most work."""
    sums = ("bytes", "forward_seconds", "write_seconds", "build_seconds", "resumed_chunks")
    known = {key: [one[key] for one in found.values()] for key in sums}
    status = min((one["status"] for one in found.values()), key=("resumed", "built", "exists").index)
    totals = {key: None if None in values else sum(values) for key, values in known.items()}
    return {"status": status, "examples": dict(sizes), **totals, "streams": dict(found)}


def _took(one: Mapping[str, Any]) -> str:
    return "" if one["build_seconds"] is None else f" in {one['build_seconds']:.1f} s"


@cache_app.command("ls")
def cache_ls(cache_dir: CacheDir = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the caches, complete or not."""
    from ..cache.catalog import entries

    found: list[dict[str, Any]] = [
        {
            "digest": e.folder.name.removesuffix(".zarr") if e.manifest is None else e.manifest.digest,
            "path": str(e.folder),
            "backbone": e.notes.get("backbone"),
            "task": e.notes.get("task"),
            "examples": None if e.manifest is None else e.manifest.examples,
            "bytes": e.bytes,
            "complete": e.manifest is not None,
            "created": e.notes.get("created"),
        }
        for e in entries(caches(cache_dir))
    ]
    lines = [
        f"{row['digest'][:16]}  {row['bytes'] / 2**20:10,.1f} MiB  "
        f"{row['examples'] if row['complete'] else 'incomplete'}  {row['backbone']}  {row['task']}  {row['created']}"
        for row in found
    ]
    show(found, as_json, "\n".join(lines) or f"no caches in {caches(cache_dir)}")


@cache_app.command("info")
def cache_info(store: Store, cache_dir: CacheDir = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Print the whole manifest of a cache, by digest (or its beginning) or path."""
    from ..cache.catalog import locate, read_notes
    from ..cache.manifest import read_manifest

    folder = locate(store, caches(cache_dir))
    manifest, objects = read_manifest(folder)
    document = {
        "digest": manifest.digest,
        "path": str(folder),
        "facts": manifest.facts(),
        "objects": {key: [o.bytes, o.crc32c] for key, o in objects.items()},
        "notes": read_notes(folder),
    }
    shown = {key: value for key, value in document.items() if key != "objects"}
    show(document, as_json, json.dumps({**shown, "objects": len(objects)}, indent=1))


@cache_app.command("verify")
def cache_verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Recompute what is bad from the same backbone and task.")
    ] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read every object of a cache and compare it with the manifest; exit code 1 when something is (still) bad."""
    from dataclasses import asdict

    from ..cache.catalog import locate
    from ..cache.manifest import read_manifest
    from ..cache.zarr_store import verify

    folder = locate(store, caches(cache_dir))
    repaired: dict[str, int] = {}
    if repair:
        from ..cache.home import home
        from .repair import repair_store

        with displayed(quiet) as display:
            mended = repair_store(
                folder, home=home(), cache_dir=caches(cache_dir), progress=display.examples, say=display.say
            )
        bad, repaired = mended.bad, {"repaired": mended.repaired}
    else:
        bad = verify(folder)
    chunks = sum(layout.chunks for layout in read_manifest(folder)[0].arrays().values())
    lines = [f"repaired: {mended.repaired}"] if repair else []
    lines += [f"{b.layer} {b.chunk}: {b.reason}" for b in bad] or [f"all {chunks} chunks are as written"]
    document = {"ok": not bad, "chunks": chunks, "bad": [asdict(b) for b in bad], **repaired}
    show(document, as_json, "\n".join(lines))
    if bad:
        raise typer.Exit(1)


@cache_app.command("export")
def cache_export(
    store: Store,
    to: Annotated[Path, typer.Option(help="The HDF5 file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a cache as one HDF5 file: every array, and the manifest as an attribute."""
    from ..cache.catalog import locate
    from ..cache.export import export_store

    folder = locate(store, caches(cache_dir))
    with displayed(quiet) as display:
        size = export_store(folder, to, force=force, progress=display.examples)
    show({"path": str(folder), "file": str(to), "bytes": size}, as_json, f"exported: {to} ({size:,} bytes)")


@cache_app.command("import")
def cache_import(
    file: Annotated[Path, typer.Argument(help="An exported cache, or features: one HDF5 dataset per layer.")],
    task: Annotated[str | None, typer.Option(help="The task the features are of; its order unless `ids` says.")] = None,
    backbone_name: Annotated[str | None, typer.Option(help="For `bench compare --backbone imported:NAME`.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Datasets in forward order. Default: all, layer.2 before layer.10.")
    ] = None,
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Leading tokens that no mean includes (class token).")] = 0,
    limit: Limit = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a cache of an HDF5 file: an exported cache, or features (N, T, D) or (N, D) per layer."""
    from ..cache.features import ImportOptions
    from ..cache.home import home
    from .importing import import_hdf5

    with displayed(quiet) as display:
        result = import_hdf5(
            file,
            task,
            ImportOptions(backbone_name, names_of(layers), prefix_tokens, limit),
            home=home(),
            cache_dir=caches(cache_dir),
            progress=display.examples,
            say=display.say,
        )
    document = {
        "status": result.status,
        "digest": result.manifest.digest,
        "path": str(result.folder),
        "examples": result.manifest.examples,
        "layers": list(result.manifest.layers),
        "keys": result.manifest.backbone.get("keys"),
        "bytes": result.manifest.stored_bytes,
    }
    show(document, as_json, f"{result.status}: {result.folder} ({result.manifest.stored_bytes:,} bytes)")


@cache_app.command("rm")
def cache_rm(
    store: Store,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Remove a cache, by digest (or its beginning) or path."""
    from ..cache.catalog import locate, remove

    folder = locate(store, caches(cache_dir))
    if not yes and not agreed(f"Remove {folder}?"):
        raise SidebenchError("nothing was removed; --yes removes without asking.")
    remove(folder)
    show({"removed": str(folder)}, as_json, f"removed {folder}")
