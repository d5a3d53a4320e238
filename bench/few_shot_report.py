"""What a comparison over several numbers of shots adds to the report: scores as table and curve, and gains."""

from collections.abc import Mapping, Sequence
from typing import Any

from .jobs import LR_SHOTS
from .markdown import interval, table, text
from .outcome import Outcome
from .record import replacing
from .table import Compared, gains

Row = Mapping[str, Any]
CURVE = "score-over-shots.svg"


def protocol(outcome: Outcome) -> str:
    """How the examples were drawn."""
    sizes = "; ".join(
        f"{shots}: {found['train']} and {found['val']}" for shots, found in sorted(outcome.few_shot_sizes.items())
    )
    return (
        "Few-shot: so many examples of each class, drawn from the training part by training seed and id, the same for "
        "every method, and all of a class that has fewer; min(shots, 4) others of each class, from the training part "
        "too, validate. The test part is whole, the task's own validation part unused. Shots: training and validation "
        f"examples, {sizes}."
    )


def rates(outcome: Outcome) -> str:
    """Where the learning rates come from."""
    grid = "0.3, 1 and 3 times the default" if outcome.request.lr == "auto" else str(outcome.request.lr)
    first = outcome.request.seeds[0]
    return f"chosen on validation once for each method, at {LR_SHOTS} shots of seed {first}, from {grid}"


def sections(outcome: Outcome, rows: Sequence[Row], compared: Sequence[Compared]) -> list[str]:
    """Paragraphs for the report; `CURVE` lies beside it, where it could be drawn."""
    found = ["## Score over shots", _scores(outcome, rows)]
    if (outcome.folder / CURVE).exists():
        found.append(f"![{text(outcome.score_name)} over shots]({CURVE})")
    if gained := gains(outcome, compared):
        found += ["## Gain of the pre-trained initialisation", _gains(gained)]
    return found


def _scores(outcome: Outcome, rows: Sequence[Row]) -> str:
    shots = sorted({row["shots"] for row in rows})
    by_place = {(row["method"], row["shots"]): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    body = [[method, *(_score(by_place[method, k]) for k in shots)] for method in methods]
    return "\n\n".join(
        [
            table(("method", *(f"{k} shot{'s' * (k > 1)}" for k in shots)), body),
            f"{text(outcome.score_name)} in percent, mean over seeds; in brackets 95 % over seeds (Student t).",
        ]
    )


def _score(row: Row) -> str:
    if row["score"] is None:
        return "failed"
    around = f" ({interval(row['score']['ci95'])})" if row["score"]["ci95"] else ""
    return f"{100 * row['score']['mean']:.2f}{around}"


def _gains(gained: Sequence[Compared]) -> str:
    head = ("method", "shots", "gain, points", "95 % over seeds", "95 % over test examples", "p (Holm)", "verdict")
    body = [
        [
            c.method,
            "" if c.shots is None else str(c.shots),
            f"{100 * c.difference:+.2f}",
            interval(c.seeds_ci95),
            interval(c.ci95),
            f"{c.p_adjusted:.4f}",
            c.verdict,
        ]
        for c in gained
    ]
    return "\n\n".join(
        [
            table(head, body),
            "Against the same method from its own random initialisation, on the same training, validation and test "
            "examples, with the same head and order; the learning rate of each arm is chosen as said below. 95 % over "
            "seeds: Student t of the seeds' differences. 95 % over test examples: paired bootstrap. The verdict is on "
            "these trained models and other test examples.",
        ]
    )


def draw_curve(outcome: Outcome, rows: Sequence[Row]) -> str | None:
    """Write `CURVE` into the comparison's folder; or say why it is not drawn.

    The same rows give the same bytes.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        (outcome.folder / CURVE).unlink(missing_ok=True)  # of an earlier comparison
        return "the curve over shots is not drawn: matplotlib is not installed (pip install 'sidebench[plots]')."
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted(
            (row["shots"], row["score"]["mean"], row["score"]["ci95"])
            for row in rows
            if row["method"] == method and row["score"]
        )
        if not points:
            continue
        x, y = [shots for shots, _, _ in points], [100 * mean for _, mean, _ in points]
        low = [100 * (mean - (around or [mean])[0]) for _, mean, around in points]
        high = [100 * ((around or [mean])[-1] - mean) for _, mean, around in points]
        # A dollar sign would start a formula.
        axes.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, label=str(method).replace("$", r"\$"))
    axes.set_xscale("log", base=2)
    shots = sorted({row["shots"] for row in rows})
    axes.set_xticks(shots, labels=list(map(str, shots)))
    axes.set_xlabel("training examples of each class")
    axes.set_ylabel(f"{outcome.score_name}, % (bars: 95 % over seeds)")
    axes.legend()
    same = {"svg.hashsalt": "sidebench", "svg.fonttype": "none"}  # same bytes for same rows, whatever fonts there are
    with mpl.rc_context(same), replacing(outcome.folder / CURVE) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
    return None
