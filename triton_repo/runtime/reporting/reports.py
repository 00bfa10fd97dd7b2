"""Everything that a served engine tells an operator: metrics, and a line for each request.

reports = Reports.start(engine, "phixtral", pb_utils.MetricFamily)
reports.stop()
"""

from __future__ import annotations

from dataclasses import dataclass

from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.reporting.metrics import Families, Metrics
from triton_repo.runtime.reporting.request_log import RequestLog


@dataclass(frozen=True, kw_only=True)
class Reports:
    """The reports of one instance of a model; None for what Triton or `serve` does not take."""

    metrics: Metrics | None
    log: RequestLog | None

    @classmethod
    def start(cls, engine: SequenceEngine, model: str, families: Families) -> Reports:
        """Begin to report. `families` is Triton's class of metrics."""
        log = RequestLog.from_environment(model)
        if log is not None:
            engine.accounts.report = log.add
        return cls(metrics=Metrics.start(engine, model, families), log=log)

    def stop(self) -> None:
        """Report what is left and end. The engine must have ended."""
        if self.metrics is not None:
            self.metrics.stop()
        if self.log is not None:
            self.log.close()
