"""The report's page: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepforge.cli.pages import render_page
from stepforge.cli.report import charts, findings
from stepforge.cli.report.findings import Finding
from stepforge.cli.report.run import Run

__all__ = ["render"]

#: Layers that are named for one finding.
_MOST_NAMES = 12


def render(run: Run, found: Sequence[Finding]) -> str:
    """Return the page as text.

    Args:
        run: the run.
        found: what looks wrong in it.
    """
    maps = charts.heat_maps(run, found)
    loss = run.metrics.get("loss", np.array([]))
    finite = loss[np.isfinite(loss)]
    return render_page(
        "stepforge.cli.report",
        name=Path(run.name).name,
        run=run,
        first=int(run.steps[0]),
        last=int(run.steps[-1]),
        loss=(float(finite[0]), float(finite[-1])) if len(finite) else None,
        findings=[
            (finding, finding.layers[:_MOST_NAMES], len(finding.layers) - _MOST_NAMES)
            for finding in found
        ],
        charts=charts.line_charts(run),
        maps=maps,
        skips=bool(findings.skipped_lines(run).any()),
        thresholds=findings,
    )
