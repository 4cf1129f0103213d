"""Checkpoints of sharded trainings: each rank writes the shards that it holds, by torch.distributed.checkpoint (DCP).

The folder of such a checkpoint has the files of DCP besides `state.pt` and `manifest.json`. `state.pt` holds all that
is not sharded, None in the place of each sharded tensor, and an index of the shards. So trainkit does not read
`.metadata`, the index of DCP, which is a pickle. It is there for other tools.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.core.atomic import open_regular_file
from trainkit.core.errors import StorageError
from trainkit.core.ranks import Ranks
from trainkit.core.shards import is_sharded, whole
from trainkit.runs.checkpoint_files import SHARDS, DamagedError, check_archive, digest_file

INDEX = "shards"  # the key of the index in `state.pt`
Place = tuple[Any, ...]  # the keys that lead to a tensor in a state


# --------------------------------------------------------------------------------- shards in a state


def map_shards(content: Any, change: Callable[[Place, Tensor], Any], place: Place = ()) -> Any:
    """Return a state with another value for each sharded tensor.

    Args:
        content: nested containers.
        change: gets the place of the tensor and the tensor.
        place: the place of the content.
    """
    if is_sharded(content):
        return change(place, content)
    if isinstance(content, Mapping):
        items = {key: map_shards(value, change, (*place, key)) for key, value in content.items()}
        if not isinstance(content, OrderedDict):
            return items
        ordered = OrderedDict(items)
        ordered.__dict__.update(content.__dict__)  # the versions of layers, see `copy_to_cpu`
        return ordered
    if isinstance(content, list | tuple):
        return type(content)(map_shards(value, change, (*place, number)) for number, value in enumerate(content))
    return content


def gather_shards(content: Any) -> Any:
    """Return a state with whole tensors instead of shards. All ranks must call it."""
    return map_shards(content, lambda _, tensor: whole(tensor))


def take_shards(content: Any) -> tuple[Any, dict[Place, Tensor]]:
    """Return a state with None in the place of each sharded tensor, and these tensors by their places."""
    shards: dict[Place, Tensor] = {}

    def take(place: Place, tensor: Tensor) -> None:
        shards[place] = tensor

    return map_shards(content, take), shards


# ---------------------------------------------------------------------------------------------- write


def write_shards(folder: Path, shards: Mapping[Place, Tensor], ranks: Ranks) -> tuple[dict[str, Any], list[Any]]:
    """Write the shards of this rank into a folder. All ranks must call it.

    Args:
        folder: an existing folder, which all ranks reach.
        shards: the sharded tensors by their places in the state.
        ranks: the ranks.

    Returns:
        The size and the sha256 of each file that this rank has written, by name; and on rank 0 the index for
        `state.pt`.

    Raises:
        StorageError: a rank cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    written: list[Any] = []  # on rank 0, what all ranks have written

    class Writer(FileSystemWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            super().finish(metadata, results)
            written.extend(result for of_rank in results for result in of_rank)

    names = {".".join(map(str, place)): place for place in shards}
    writer = Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.fs.create_stream = _open_stream  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metadata: Any = save({name: shards[place] for name, place in names.items()}, storage_writer=writer)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        text = f"rank {rank} cannot write into {folder}: {getattr(cause, 'strerror', None) or cause}"
        raise StorageError(
            text, hint="all ranks write into the run directory, so all machines must share it"
        ) from error
    index: dict[str, dict[str, Any]] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        facts = {"place": list(names[name]), "shape": list(tensor.size), "dtype": tensor.properties.dtype}
        index[name] = {**facts, "parts": []}
    for result in written:
        key, place = result.index, result.storage_data
        part = {"offset": list(key.offset), "file": place.relative_path, "start": place.offset, "bytes": place.length}
        index[key.fqn]["parts"].append(part)
    own = [path for path in sorted(folder.glob(f"__{ranks.rank}_*.distcp")) if SHARDS.fullmatch(path.name)]
    own += [folder / ".metadata"] if ranks.is_first else []
    return {path.name: digest_file(path) for path in own}, [*index.values()]


class _KeepingFile(io.BufferedWriter):
    """A file that raises an OSError of `write` in `flush`, because torch's writer would replace it by another error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes

    def flush(self) -> None:
        if self.error is not None:
            raise self.error
        super().flush()


@contextlib.contextmanager
def _open_stream(path: Any, mode: str) -> Iterator[Any]:
    """Open a file as the `FileSystem` of DCP does."""
    with _KeepingFile(io.FileIO(path, mode)) as stream:
        yield stream


# ----------------------------------------------------------------------------------------------- read


def insert_shards(saved: dict[str, Any], folder: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of `state.pt` with the tensors of its index, which are read from the folder.

    Args:
        saved: the content.
        folder: the folder of the checkpoint, whose files are verified.
        sizes: the sizes of its files, in bytes.

    Raises:
        DamagedError: the index does not fit the files or the content.
    """
    index = saved.pop(INDEX, None)
    if index is None:
        return saved
    try:
        total = sum(math.prod(entry["shape"]) * entry["dtype"].itemsize for entry in index)
        if any(size < 0 for entry in index for size in entry["shape"]) or total > sum(sizes.values()):
            raise ValueError("the tensors of its index are larger than its files")
        for entry in index:
            *parents, key = entry["place"]
            container: Any = saved
            for parent in parents:
                container = container[parent]
            if container[key] is not None:
                raise ValueError(f"the place {entry['place']} of a shard is taken")
            container[key] = _read_tensor(folder, entry, sizes)
    except DamagedError:
        raise
    except Exception as error:  # torch and pickle raise errors of many types
        raise DamagedError(f"its shards cannot be read: {type(error).__name__}: {error}") from error
    return saved


def _read_tensor(folder: Path, entry: Mapping[str, Any], sizes: Mapping[str, int]) -> Tensor:
    """Return a whole tensor, put together from its parts."""
    tensor = torch.empty(entry["shape"], dtype=entry["dtype"])
    filled = 0
    for offset, part in _read_parts(folder, entry, sizes):
        place = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        tensor[place].copy_(part)
        filled += part.numel()
    if filled != tensor.numel():
        raise ValueError(f"{filled} of {tensor.numel()} values are in the files")
    return tensor


def _read_parts(folder: Path, entry: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the parts of a tensor, each with its offset in the tensor."""
    for part in entry["parts"]:
        name, start, length = part["file"], part["start"], part["bytes"]
        if not 0 <= start <= start + length <= sizes[name]:
            raise ValueError(f"a part is outside of {name}")
        with open_regular_file(folder / name) as file:
            file.seek(start)
            content = io.BytesIO(file.read(length))
        check_archive(content, length)
        content.seek(0)
        value = torch.load(content, map_location="cpu", weights_only=True)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} contains a {type(value).__name__}, expected a tensor")
        yield part["offset"], value
