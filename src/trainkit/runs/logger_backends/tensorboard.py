"""TensorBoard: an event file with scalars by epoch, the config and the status."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from trainkit.runs.loggers import LoggedRun, plain


class TensorBoard:
    """Writes an event file, in the thread of the caller: TensorBoard's own writer waits for ever on a full disk.

    Args:
        directory: the directory of the file, in the run directory unless the path is absolute.
    """

    def __init__(self, directory: str = "tensorboard") -> None:
        self.directory = directory
        self.epoch = 0

    def start(self, run: LoggedRun) -> int:
        """Open a new event file and write the config. TensorBoard drops the later epochs of older files."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.hparams import summary_v2 as hparams
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.new_event = event_pb2.Event
        folder = run.path(self.directory)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        self.file = (folder / name).open("xb")
        self.writer = RecordWriter(self.file)
        self.epoch = min(run.epochs, run.logged)
        self._write(file_version="brain.Event:2")
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(session_log=restart, step=self.epoch + 1)
        config = {key: plain(value) for key, value in run.config.items()}
        table = "\n".join(["key | value", "--- | ---", *(f"{key} | {value}" for key, value in config.items())])
        self._write(summary=_text("config", table), step=self.epoch)
        self._write(summary=hparams.hparams_pb(config, trial_id=run.id), step=self.epoch)
        return self.epoch

    def log_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the numbers in float64."""
        self.epoch = epoch
        self._write(summary=_scalars(values), step=epoch)

    def finish(self, status: str, why: str | None) -> None:
        """Write the status and close the file."""
        self._write(summary=_session_end(completed=status == "completed"), step=self.epoch)
        self._write(summary=_text("status", f"{status}: {why}" if why else status), step=self.epoch)
        self.file.close()

    def _write(self, **fields: Any) -> None:
        self.writer.write(self.new_event(wall_time=time.time(), **fields).SerializeToString())
        self.file.flush()


def _scalars(values: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2

    summary = summary_pb2.Summary()
    for name, value in values.items():
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_DOUBLE, double_val=[value])
        summary.value.add(tag=name, tensor=tensor, metadata=_metadata("scalars", summary_pb2.DATA_CLASS_SCALAR))
    return summary


def _text(name: str, text: str) -> Any:
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2

    summary = summary_pb2.Summary()
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
    summary.value.add(tag=name, tensor=tensor, metadata=_metadata("text", summary_pb2.DATA_CLASS_TENSOR))
    return summary


def _session_end(*, completed: bool) -> Any:
    """Return the status for the table of hyperparameters."""
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_SUCCESS if completed else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    summary = summary_pb2.Summary()
    about = metadata.create_summary_metadata(content)
    summary.value.add(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
    return summary


def _metadata(plugin: str, data_class: int) -> Any:
    from tensorboard.compat.proto import summary_pb2

    data = summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin)
    return summary_pb2.SummaryMetadata(plugin_data=data, data_class=data_class)
