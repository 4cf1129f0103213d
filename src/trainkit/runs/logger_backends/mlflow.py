"""MLflow: a run of an experiment, on a server or in a database file."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping

from trainkit.runs.loggers import LoggedRun, plain

TAG = "trainkit.id"  # by which a resumed run finds its MLflow run
MAX_PARAMS = 100  # of a request
# Without these, MLflow waits minutes for a server that does not answer. It also sends usage statistics.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MLflow:
    """Logs to a run of MLflow, without MLflow's global state. Values of an epoch are never logged twice.

    Args:
        experiment: the experiment, created if it does not exist.
        tracking_uri: the URI of the store; None: the variable MLFLOW_TRACKING_URI, or mlflow.db in the run directory.
    """

    def __init__(self, experiment: str = "trainkit", tracking_uri: str | None = None) -> None:
        self.experiment, self.tracking_uri = experiment, tracking_uri

    def start(self, run: LoggedRun) -> int:
        """Start or continue the run; return the last epoch that the store holds."""
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        local = f"sqlite:///{run.directory / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local)
        found = self.client.get_experiment_by_name(self.experiment)
        experiment = self.experiment_id = found.experiment_id if found else self._create_experiment(run)
        runs = self.client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if runs:
            self.id = runs[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {TAG: run.id, **({"sweep": run.group} if run.group else {})}
            self.id = self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        # A param cannot change, so a value that a resume changes becomes a tag.
        logged = runs[0].data.params if runs else {}
        params = {key: str(plain(value)) for key, value in run.config.items()}
        new = [Param(key, value) for key, value in params.items() if key not in logged]
        for first in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.id, params=new[first : first + MAX_PARAMS])
        for key in [key for key in logged if key in params and logged[key] != params[key]]:
            self.client.set_tag(self.id, f"config/{key}", params[key])
        return max((metric.step for metric in self.client.get_metric_history(self.id, "step")), default=0)

    def _create_experiment(self, run: LoggedRun) -> str:
        is_local = not self.tracking_uri and "MLFLOW_TRACKING_URI" not in os.environ
        place = (run.directory / "mlartifacts").as_uri() if is_local else None
        identifier: str = self.client.create_experiment(self.experiment, artifact_location=place)
        return identifier

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the numbers at the step `epoch`."""
        from mlflow.entities import Metric

        now = time.time_ns() // 10**6
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, epoch) for name, value in values.items()])

    def finish(self, status: str, why: str | None) -> None:
        """Write the status of the run, and the cause as the tag `why`."""
        self.client.set_tag(self.id, "status", status)
        self.client.set_tag(self.id, "why", why or "")
        ends = {"completed": "FINISHED", "stopped": "KILLED"}
        self.client.set_terminated(self.id, ends.get(status, "FAILED"))
