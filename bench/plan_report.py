"""The terminal's table of a plan, every unit and kind named."""

from collections.abc import Mapping
from typing import Any

_MIB = 2**20
_CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "inputs", "temporaries")
COLUMNS = ("method", "kind", "trainable params", "peak MiB", *(f"{name} MiB" for name in _CATEGORIES))


def title(document: Mapping[str, Any]) -> str:
    """What the figures are."""
    step = document["step"]
    return (
        f"{document['backbone']}, batch {step['batch_size']}, {step['precision']}: predicted, requested bytes, "
        f"{'CPU' if document['semantics'] == 'cpu' else 'CUDA'} semantics"
    )


def columns(document: Mapping[str, Any]) -> tuple[str, ...]:
    """The head of the table: allocator figures under CUDA semantics, what fits where a memory was given."""
    allocator = () if document["semantics"] == "cpu" else ("allocated MiB", "reserved MiB")
    before = ("before training MiB",) if _initialised(document) else ()
    fits = () if document["device_memory_bytes"] is None else ("fits", "largest batch")
    return (*COLUMNS, *allocator, *before, *fits)


def cells(document: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """One row of the table as text."""
    shown = [
        row["method"],
        row["kind"],
        "" if row["trainable_params"] is None else f"{row['trainable_params']:,}",
        _mib(row["predicted_peak_bytes"]),
        *(_mib(None if row["by_category"] is None else row["by_category"][name]) for name in _CATEGORIES),
    ]
    if document["semantics"] != "cpu":
        shown += [_mib(row["predicted_allocated_bytes"]), _mib(row["predicted_reserved_bytes"])]
    if _initialised(document):
        shown.append(_mib(row["initialisation_peak_bytes"]))
    if document["device_memory_bytes"] is not None:
        shown += ["" if row["fits"] is None else "yes" if row["fits"] else "no", _batch(row["largest_batch"])]
    return shown


def sentences(document: Mapping[str, Any]) -> list[str]:
    """What the table does not hold: assumptions, methods left out, the cache."""
    lines = [f"{row['method']}: {row['assumes']}." for row in document["methods"] if row.get("assumes")]
    for row in document["methods"]:
        if row["predicted_peak_bytes"] is None:
            lines.append(f"{row['method']} cannot be predicted: {row['unavailable']['predicted_peak_bytes']}.")
    lines += [
        f"{row['method']}: before training it back-propagates through the whole backbone, one example at a time, which "
        f"takes {_mib(row['initialisation_peak_bytes'])} MiB{_of_the_device(document, row)}."
        for row in _initialised(document)
    ]
    lines += [f"{skipped['method']} is left out: {skipped['reason']}" for skipped in document["skipped"]]
    if document["semantics"] != "cpu":
        lines.append("No GPU confirmed these figures; library workspaces and the CUDA context come on top.")
    return [*lines, _cache(document["cache"])]


def _initialised(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of methods whose initialisation needs the backbone and its gradients."""
    return [row for row in document["methods"] if row["initialisation_peak_bytes"]]


def _of_the_device(document: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    memory = document["device_memory_bytes"]
    return "" if memory is None or row["initialisation_peak_bytes"] <= memory else ", more than there is"


def _cache(cache: Mapping[str, Any]) -> str:
    streams = cache.get("streams")
    sizes = _size(cache) if streams is None else "; ".join(f"{name}s {_size(one)}" for name, one in streams.items())
    text = f"cache of {len(cache['layers'])} layers: {sizes}"
    if cache["forward_seconds_per_example"] is not None:
        text += f"; one forward takes {cache['forward_seconds_per_example'] * 1e3:.2f} ms per example here"
    if cache["read_bytes_per_second"] is not None:
        text += f", reading runs at {cache['read_bytes_per_second'] / _MIB:,.0f} MiB/s (page cache)"
    if cache["build_seconds"] is not None:
        like = ", were every text as long as the longest" if cache["ragged"] else ""
        text += f"; building takes about {cache['build_seconds']:,.0f} s{like}"
    if cache["break_even_passes"] is not None:
        return f"{text}; building pays after {cache['break_even_passes']:.1f} passes."
    return f"{text}. Break-even passes unknown: {cache['unavailable']['break_even_passes']}."


def _size(cache: Mapping[str, Any]) -> str:
    text = f"{cache['bytes_per_example']:,} bytes per example"
    return text if cache["bytes"] is None else f"{text}, {_mib(cache['bytes'])} MiB for {cache['examples']:,} examples"


def _batch(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['batch_size']:,}{'' if found['confirmed'] else ' (extrapolated)'}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / _MIB:,.1f}"


def print_plan(document: Mapping[str, Any]) -> None:
    """The table and its sentences on stdout, as wide as they need to be where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns(document), title=title(document), box=box.SIMPLE)
    for row in document["methods"]:
        table.add_row(*map(Text, cells(document, row)))  # a name is text, never rich's markup
    console = Console()
    console = console if console.is_terminal else Console(width=220)
    console.print(table)
    print("\n".join(sentences(document)))
