"""The foundation that every folder may import: errors, paths, RNG states, devices, nested tensors.

Nothing here imports another folder of trainkit. `errors`, `imports`, `spelling`, `source`, `paths`, `redaction` and
`terminal` do not import torch.
"""

from trainkit.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    OutOfMemoryError,
    Problem,
    RunDirectoryInUseError,
    Stopped,
    StorageError,
    TrainkitError,
    UserCodeError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Problem",
    "RunDirectoryInUseError",
    "Stopped",
    "StorageError",
    "TrainkitError",
    "UserCodeError",
]
