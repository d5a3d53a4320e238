"""What is done with the outcome of a comparison: its report and curve are written, and the rest is there to print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .few_shot_report import draw_curve
from .outcome import Outcome
from .record import write_text
from .report import failures, markdown, skipped, verdicts
from .table import comparisons, document, rows


@dataclass(frozen=True)
class Finished:
    """The rows, the document that --json prints, and the sentences that stand below the table."""

    table: Sequence[dict[str, Any]]
    document: dict[str, Any]
    sentences: Sequence[str]


def finish(outcome: Outcome) -> Finished:
    """Write `report.md`, and of few shots the curve, into the comparison's folder."""
    table, compared, report = rows(outcome), comparisons(outcome), outcome.folder / "report.md"
    undrawn = draw_curve(outcome, table) if outcome.few_shot_sizes else None
    write_text(report, markdown(outcome, table, compared))
    sentences = [*([undrawn] if undrawn else []), *failures(table), *skipped(outcome), *verdicts(outcome, compared)]
    return Finished(table, document(outcome, table, compared, report), [*sentences, f"report: {report}"])
