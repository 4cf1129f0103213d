"""The displays of a training: live bars on a terminal, otherwise a line for each epoch.

Each display is a hook of the training loop. Displays write to stderr; stdout is for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainkit.core.terminal import printable
from trainkit.display.text import epoch_line, nonfinite_line, oom_line, sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trainkit.core.errors import NonFiniteError
    from trainkit.training.state import State

REFRESH = 0.1  # seconds between two reads of the running loss; each read synchronizes the device


def make_display(progress: str) -> Silent:
    """Return the display for `progress`: auto, rich, tqdm, plain or off."""
    return display_class(progress)()


def display_class(progress: str) -> type[Silent]:
    """Return the class of the display for `progress`; auto means rich on a terminal, otherwise plain."""
    if sys.stderr is None:  # closed, for example by `2>&-`
        return Silent
    if progress == "auto":
        progress = "rich" if sys.stderr.isatty() else "plain"
    return {"rich": Rich, "tqdm": Tqdm, "plain": Plain, "off": Silent}[progress]


class ReadingProgress:
    """Shows how many samples are read into memory: a bar on a terminal, otherwise a line every few seconds."""

    INTERVAL = 5.0  # seconds between two lines, and before the first line

    def __init__(self, progress: str) -> None:
        self.display_class = display_class(progress)
        self.printed_at = time.monotonic()
        self.bar: Any = None

    def __call__(self, text: str, done: int, total: int) -> None:
        """Show that `done` of `total` samples are read."""
        if self.display_class in (Rich, Tqdm):
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(total=total, desc=text, unit=" samples", leave=False, dynamic_ncols=True)
            self.bar.update(done - self.bar.n)
        elif self.display_class is Plain and time.monotonic() - self.printed_at > self.INTERVAL:
            self.printed_at = time.monotonic()
            print(f"{text}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    def __enter__(self) -> ReadingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


class SafeDisplay:
    """Wraps a display and turns it off if it cannot write, so that a closed terminal does not end a training."""

    def __init__(self, display: Silent) -> None:
        self.display = display

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.display, name)

        def call(*args: Any) -> None:
            try:
                method(*args)
            except (OSError, ValueError):  # a closed file raises ValueError
                self.display = Silent()

        return call


class Silent:
    """Prints nothing."""

    def print_line(self, text: str) -> None:
        """Print a line that stays on the screen."""

    def close(self) -> None:
        """Remove the bars and restore the terminal."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Plain(Silent):
    """Prints a line for each epoch and each event."""

    def print_line(self, text: str) -> None:
        """Print a line."""
        print(printable(text), file=sys.stderr, flush=True)

    def on_epoch_end(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Print the metrics of the epoch."""
        self.print_line(epoch_line(state, metrics))

    def on_split(self, state: State) -> None:
        """Print that memory ran out."""
        self.print_line(oom_line(state))

    def on_note(self, state: State, line: str) -> None:  # noqa: ARG002
        """Print a note."""
        self.print_line(line)

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:
        """Print which batch was skipped."""
        self.print_line(nonfinite_line(state, error))


class Tqdm(Plain):
    """Shows a bar for each epoch, in notebooks too."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        self.tqdm = tqdm
        self.bar: Any = None
        self.read_at = 0.0

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        self.tqdm.write(printable(text), file=sys.stderr)

    def on_step(self, state: State) -> None:
        """Advance the bar; refresh the running loss if `REFRESH` seconds have passed."""
        progress = state.progress
        if self.bar is None:
            name = f"epoch {progress.epoch + 1}" + (f"/{state.epochs}" if state.epochs else "")
            self.bar = self.tqdm(total=state.planned_batches, initial=progress.batch - 1, desc=name, leave=False)
        self.bar.update()
        if time.monotonic() - self.read_at > REFRESH:
            self.bar.set_postfix_str(f"loss {progress.loss.item():.4f}", refresh=False)
            self.read_at = time.monotonic()

    def on_epoch_end(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Close the bar and print the epoch."""
        self.close()
        super().on_epoch_end(state, metrics)

    def close(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Rich(Plain):
    """Shows bars for epochs and batches, the running loss, samples/s, the time left, and a sparkline of the losses."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.losses: list[float] = []
        self.read_at = self.epoch_began = 0.0
        self.console = Console(stderr=True, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description:<6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self.live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=1 / REFRESH, transient=True
        )

    def render(self) -> RenderableType:
        """Return the bars, with a sparkline of the epochs' losses below."""
        from rich.console import Group
        from rich.text import Text

        return Group(self.bars, Text(f"losses {sparkline(self.losses)}")) if self.losses else self.bars

    def print_line(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def on_start(self, state: State) -> None:
        """Show the bars."""
        progress, steps = state.progress, state.settings.steps
        self.whole = self.bars.add_task("epoch" if steps is None else "step", total=steps or state.epochs, text="")
        self.batches = self.bars.add_task("batch", total=state.planned_batches, text="")
        self.show_whole(state)
        self.live.start()
        self.epoch_began, self.seen_before = time.monotonic(), progress.seen

    def show_whole(self, state: State, **text: str) -> None:
        """Advance the bar of the whole training, which counts steps if the training is planned in steps."""
        progress = state.progress
        epochs = progress.epoch + progress.batch / progress.batches
        self.bars.update(self.whole, completed=epochs if state.settings.steps is None else progress.step, **text)  # type: ignore[arg-type]

    def on_step(self, state: State) -> None:
        """Advance the bars and refresh the running loss if `REFRESH` seconds have passed."""
        now, progress = time.monotonic(), state.progress
        if now - self.read_at < REFRESH:
            return
        self.read_at = now
        loss = progress.loss.item()
        rate = (progress.seen - self.seen_before) / max(now - self.epoch_began, 1e-9)
        self.bars.update(self.batches, completed=progress.batch, text=f"loss {loss:.4f}  {rate:,.0f} samples/s")
        self.show_whole(state)

    def on_epoch_end(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Print the epoch above the bars and reset the batch bar."""
        self.losses.append(metrics["train/loss"])
        super().on_epoch_end(state, metrics)
        self.show_whole(state, text=f"loss {metrics['train/loss']:.4f}")
        if not state.done:
            self.bars.reset(self.batches, total=state.planned_batches, text="")
        self.epoch_began, self.seen_before = time.monotonic(), 0

    def close(self) -> None:
        """Remove the bars; printed lines stay."""
        self.live.stop()
