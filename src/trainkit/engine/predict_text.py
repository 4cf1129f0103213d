"""Predictions of a language model: how probable the lines of a text are, and which token follows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.core.errors import ConfigError
from trainkit.core.pytree import describe
from trainkit.data.raw_files import RawSample
from trainkit.engine.prediction_rows import best_first, exact

Row = dict[str, Any]


def predict_lines(
    forward: Callable[[Tensor], Any],
    samples: Iterable[RawSample],
    size: int,
    length: int,
    vocabulary: Sequence[str] | None,
    top: int,
) -> Iterator[list[Row]]:
    """Yield the rows of lines in batches.

    A line longer than `length` tokens is read in windows. The last window ends with the line, and so has the longest
    context for the next token. Each token is scored once, and the first token of a line is not scored.

    Args:
        forward: returns the logits (N, V, T) of token ids (N, T).
        samples: lines as token ids.
        size: the number of windows in a batch.
        length: the maximum number of tokens of a window.
        vocabulary: the token of each id; None: the ids are shown.
        top: the number of next tokens in a row.
    """
    for lines in _batched(samples, size):
        windows = [
            (line, window) for line, sample in enumerate(lines) for window in _windows(len(sample.inputs), length)
        ]
        scores = [0.0] * len(lines)
        ends: dict[int, Tensor] = {}
        for chunk in _of_equal_length(windows, size):
            tokens = torch.stack([lines[line].inputs[start:stop] for line, (start, stop, _) in chunk])
            log_probabilities = _log_probabilities(forward(tokens), tokens)
            for row, (line, (start, stop, scored)) in enumerate(chunk):
                targets = lines[line].inputs[scored + 1 : stop + 1]
                found = log_probabilities[row, :, scored - start : scored - start + len(targets)]
                scores[line] += float(found.gather(0, targets[None]).double().sum())
                if stop == len(lines[line].inputs):
                    ends[line] = log_probabilities[row, :, -1]
        yield [_row(sample, scores[line], ends.get(line), vocabulary, top) for line, sample in enumerate(lines)]


def _row(sample: RawSample, score: float, end: Tensor | None, vocabulary: Sequence[str] | None, top: int) -> Row:
    """Return the row of a line: mean log-likelihood in nats and perplexity of its tokens, and the next tokens."""
    scored = len(sample.inputs) - 1
    mean = score / scored if scored > 0 else None
    perplexity = None if mean is None else math.exp(min(-mean, 700.0))
    row = {**sample.place, "tokens": len(sample.inputs), "log_likelihood": mean, "perplexity": perplexity}
    best = [] if end is None else best_first(end, top)
    for rank in range(1, top + 1):
        suffix = f"_{rank}" if rank > 1 else ""
        index = best[rank - 1] if rank <= len(best) else None
        token = None if index is None else (index if vocabulary is None else vocabulary[index])
        row |= {f"next{suffix}": token}
        row |= {f"probability{suffix}": None if end is None or index is None else exact(end[index].exp())}
    return row


def _windows(tokens: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield the windows of a line: start, stop, and the first position whose next token the window scores."""
    scored = 0
    for start in range(0, tokens, length):
        stop = min(start + length, tokens)
        yield max(0, min(start, stop - length)), stop, scored
        scored = stop


def _of_equal_length(windows: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield batches of at most `size` windows of the same length."""
    by_length: dict[int, list[Any]] = {}
    for window in windows:
        by_length.setdefault(window[1][1] - window[1][0], []).append(window)
    for group in by_length.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _batched(samples: Iterable[RawSample], size: int) -> Iterator[tuple[RawSample, ...]]:
    """Yield tuples of at most `size` samples."""
    iterator = iter(samples)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _log_probabilities(outputs: Any, tokens: Tensor) -> Tensor:
    """Return the logarithms of the probabilities, (N, V, T), on the CPU.

    Raises:
        ConfigError: the outputs are not logits of the tokens.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 3 or (len(outputs), outputs.shape[2]) != tokens.shape:
        cause = f"the model returns {describe(outputs)} for tokens {tuple(tokens.shape)}"
        raise ConfigError(cause, hint="a language model returns logits (N, V, T), as nn.CrossEntropyLoss takes them")
    return outputs.float().log_softmax(1).cpu()
