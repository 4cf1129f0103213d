"""The loggers that trainkit ships, one file per tool. Each imports its package when a run starts."""

from trainkit.runs.logger_backends.csv_files import CSV
from trainkit.runs.logger_backends.mlflow import MLflow
from trainkit.runs.logger_backends.tensorboard import TensorBoard
from trainkit.runs.logger_backends.trackio import Trackio
from trainkit.runs.logger_backends.wandb import WandB

__all__ = ["CSV", "MLflow", "TensorBoard", "Trackio", "WandB"]
