"""Readers of what the loggers write. Run as a script, it reads with the tool's own package, in a process of its own."""

from __future__ import annotations

import csv
import json
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Rows = dict[int, dict[str, list[float]]]  # epoch -> metric -> the values that the tool holds


@dataclass
class Logged:
    """What a logger wrote: the values of each epoch, the config and the status."""

    rows: Rows = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    status: str = ""
    runs: int = 1  # runs in the tool

    def add(self, epoch: int, values: dict[str, float]) -> None:
        """Add values of an epoch."""
        for name, value in values.items():
            self.rows.setdefault(epoch, {}).setdefault(name, []).append(value)


def read_logged(tool: str, run: Path) -> Logged:
    """Return what a logger wrote into a run directory."""
    if tool == "csv":
        return read_csv(run)
    if tool == "trackio":
        return read_trackio(run)
    done = subprocess.run([sys.executable, __file__, tool, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    found["rows"] = {int(epoch): row for epoch, row in found["rows"].items()}
    return Logged(**found)


def read_csv(run: Path) -> Logged:
    """Read the CSV files."""
    found = Logged()
    with (run / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found.add(int(row.pop("epoch")), {name: float(value) for name, value in row.items() if value})
    with (run / "csv" / "run.csv").open() as file:
        about = {row["key"]: row["value"] for row in csv.DictReader(file)}
    found.config = {key.removeprefix("config/"): value for key, value in about.items() if key.startswith("config/")}
    found.status = f"{about['status']}: {about['why']}" if about["why"] else about["status"]
    return found


def read_trackio(run: Path) -> Logged:
    """Read the database of Trackio."""
    database = sqlite3.connect(run / "trackio" / "trainkit.db")
    found = Logged()
    for epoch, text in database.execute("select step, metrics from metrics order by id"):
        values = json.loads(text)
        found.status = values.pop("status", found.status)
        if values.pop("epoch", None) is not None:
            found.add(epoch, {"step" if name == "train/step" else name: value for name, value in values.items()})
    for (text,) in database.execute("select config from configs"):
        found.config = {key: str(value) for key, value in json.loads(text).items()}
    found.runs = database.execute("select count(distinct run_id) from metrics").fetchone()[0]
    database.close()
    return found


def _read_tensorboard(run: Path) -> Logged:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "tensorboard"), tensor_size_guidance={"scalars": 0}).Reload()
    found = Logged()
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            if tag == "config":
                rows = [line.split(" | ", 1) for line in event.tensor_proto.string_val[0].decode().splitlines()[2:]]
                found.config = dict(rows)
            elif tag == "status":
                found.status = event.tensor_proto.string_val[0].decode()
            elif not tag.startswith("_hparams_"):
                found.add(event.step, {tag: make_ndarray(event.tensor_proto).item()})
    return found


def _read_mlflow(run: Path) -> Logged:
    from mlflow import MlflowClient

    local = run / "mlflow.db"
    client = MlflowClient(f"sqlite:///{local}" if local.exists() else (run.parent / "mlruns").as_uri())
    (experiment,) = [found for found in client.search_experiments() if found.name == "trainkit"]
    runs = client.search_runs([experiment.experiment_id])
    found = Logged(runs=len(runs))
    for name in runs[0].data.metrics:
        for metric in client.get_metric_history(runs[0].info.run_id, name):
            found.add(metric.step, {name: metric.value})
    tags = runs[0].data.tags
    found.config, found.status = runs[0].data.params, f"{tags['status']}: {tags['why']}".removesuffix(": ")
    ends = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    assert ends[tags["status"]] == runs[0].info.status
    return found


def _read_wandb(run: Path) -> Logged:
    from wandb.proto.wandb_internal_pb2 import Record

    found, names = Logged(), set()
    for file in (run / "wandb" / "latest-run").glob("run-*.wandb"):
        for content in _records(file.read_bytes()):
            record = Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                names.add(record.run.run_id)
                found.config |= {item.key or item.nested_key[0]: item.value_json for item in record.run.config.update}
            elif kind == "history":
                values = {
                    item.key or item.nested_key[0]: float(json.loads(item.value_json)) for item in record.history.item
                }
                epoch = int(values.pop("epoch"))
                found.add(epoch, {name: value for name, value in values.items() if not name.startswith("_")})
            elif kind == "summary":
                summary = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.summary.update}
                if "status" in summary:
                    found.status = summary["status"]
                if summary.get("why"):
                    found.status += f": {summary['why']}"
    found.runs = len(names)
    return found


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file: a LevelDB log in blocks of 32 KiB, after a header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or its last part
            yield whole
            whole = b""


if __name__ == "__main__":
    readers: dict[str, Any] = {"tensorboard": _read_tensorboard, "mlflow": _read_mlflow, "wandb": _read_wandb}
    print(json.dumps(vars(readers[sys.argv[1]](Path(sys.argv[2])))))
