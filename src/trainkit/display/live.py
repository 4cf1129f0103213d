"""What a person sees while it runs: a live display on a terminal, a line an epoch elsewhere.

Each display is a hook of the loop. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainkit.core.paths import display_path

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trainkit.core.errors import NonFiniteError
    from trainkit.runs.directory import Run
    from trainkit.training.state import State

REFRESH = 0.1  # seconds between two looks at the running loss, each of which waits for the device
BARS = "▁▂▃▄▅▆▇█"
SHOWN_METRICS = ("train/loss", "val/loss", "val/accuracy")
WATCHED = ("param/", "grad/")


def make_display(progress: str) -> Silent:
    """The display that `progress` names."""
    return kind(progress)()


def kind(progress: str) -> type[Silent]:
    """The kind of display that `progress` (auto, rich, tqdm, plain, off) names; auto is rich on a terminal."""
    if progress == "auto":
        progress = "rich" if sys.stderr is not None and sys.stderr.isatty() else "plain"
    if sys.stderr is None:  # closed, as by `2>&-`
        progress = "off"
    return {"rich": Rich, "tqdm": Tqdm, "plain": Plain, "off": Silent}[progress]


def epoch_line(epochs: int, metrics: Mapping[str, Any]) -> str:
    """An epoch in one line."""
    shown = [f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}"]
    shown += [f"{name} {number(value)}" for name, value in metrics.items() if name in SHOWN_METRICS]
    shown += [
        f"{name} {number(value)}" for name, value in metrics.items() if name.startswith(WATCHED) and value is not None
    ]
    shown += [f"{metrics['samples_per_second']:,.0f} samples/s", duration(metrics["seconds"])]
    return "  ".join(shown)


def split_line(state: State) -> str:
    """What was done where memory ran out."""
    seen = ", which is what layers with batch statistics see from now on" if state.objects.tracks_statistics else ""
    micro_batch = state.progress.micro_batch
    return f"note: out of memory at step {state.step + 1}: it is taken again with micro_batch={micro_batch}{seen}"


def nonfinite_line(state: State, error: NonFiniteError) -> str:
    """What was done where a loss or a gradient was not finite."""
    done = "the weights of the last checkpoint are back" if state.settings.on_nonfinite == "rollback" else "no update"
    return f"note: {error.problems[0].cause}: left out, {done} ({state.progress.skipped} in this epoch)"


def count(number: int, noun: str) -> str:
    """So many of something."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def number(value: float) -> str:
    """A metric with four digits behind the point, or in powers of ten where those would not do."""
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e6 or value != value else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Seconds as people write them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def sparkline(values: list[float], width: int = 40) -> str:
    """The last values as a row of bars, the largest the highest."""
    values = [value for value in values[-width:] if value - value == 0]  # the finite ones
    if not values:
        return ""
    low, span = min(values), (max(values) - min(values)) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def opening(run: Run) -> list[str]:
    """What is about to be trained, and where it will lie."""
    info = run.info
    frozen = info["parameters"] - info["trainable_parameters"]
    parts = [count(info["parameters"], "parameter") + (f" ({frozen:,} frozen)" if frozen else "")]
    parts.append(count(info["train_samples"], "training sample"))
    parts.append(count(info["val_samples"], "validation sample") if info["val_samples"] else "no validation")
    return [f"training on {info['device']}: {', '.join(parts)}", f"run directory: {display_path(run.directory)}"]


def result(run: Run) -> list[str]:
    """What was reached and where it lies."""
    done = len(run.history)
    reached = "no epoch has a finite loss"
    if run.best is not None:
        values = [f"{name} {number(value)}" for name, value in run.best.items() if name in SHOWN_METRICS]
        reached = f"epoch {run.best['epoch']}: {', '.join(values)}"
        reached = f"best of {count(done, 'epoch')} by {run.best['metric']}: {reached}"
    early = [run.info["why"]] if run.info["why"] else []
    return [*early, reached, f"history and config: {display_path(run.directory)}"]


def finished(run: Run) -> list[str]:
    """That nothing is left to do in a run."""
    name = shlex.quote(display_path(run.directory))
    if run.info.get("why"):
        return [f"finished; to train longer: trainkit resume {name} early_stop.patience=off", *result(run)]
    done = f"finished: it has done all of its {count(len(run.history), 'epoch')}"
    return [f"{done}; to train longer: trainkit resume {name} epochs=N", *result(run)]


class ReadingProgress:
    """Tells how far samples are read into memory: a bar, or now and then a line."""

    PAUSE = 5.0  # seconds between two lines, and before the first

    def __init__(self, progress: str) -> None:
        self.kind = kind(progress)
        self.told = time.monotonic()
        self.bar: Any = None

    def __call__(self, text: str, done: int, total: int) -> None:
        """So many of all samples are read."""
        if self.kind in (Rich, Tqdm):
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(total=total, desc=text, unit=" samples", leave=False, dynamic_ncols=True)
            self.bar.update(done - self.bar.n)
        elif self.kind is Plain and time.monotonic() - self.told > self.PAUSE:
            self.told = time.monotonic()
            print(f"{text}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    def __enter__(self) -> ReadingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


class SafeDisplay:
    """A display that falls silent where it cannot write: a terminal that is gone ends no training."""

    def __init__(self, screen: Silent) -> None:
        self.screen = screen

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.screen, name)

        def forgiving(*args: Any) -> None:
            try:
                method(*args)
            except (OSError, ValueError):  # closed files raise the latter
                self.screen = Silent()

        return forgiving


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        """A line that is no bar: what begins, what to know, an epoch."""

    def close(self) -> None:
        """Leave the terminal as it was."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Plain(Silent):
    """A line an epoch."""

    def say(self, text: str) -> None:
        """Print the line."""
        print(text, file=sys.stderr, flush=True)

    def on_epoch(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Print the epoch."""
        self.say(epoch_line(state.settings.epochs, metrics))

    def on_split(self, state: State) -> None:
        """Tell that memory ran out."""
        self.say(split_line(state))

    def on_nonfinite(self, state: State, error: NonFiniteError) -> None:
        """Tell which batch was left out."""
        self.say(nonfinite_line(state, error))


class Tqdm(Plain):
    """A bar an epoch, in notebooks too."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        self.tqdm = tqdm
        self.bar: Any = None
        self.read_at = 0.0

    def say(self, text: str) -> None:
        """Print above the bar."""
        self.tqdm.write(text, file=sys.stderr)

    def on_step(self, state: State) -> None:
        """Move the bar on, and read the running loss now and then."""
        if self.bar is None:
            name = f"epoch {state.progress.epoch + 1}/{state.settings.epochs}"
            self.bar = self.tqdm(total=state.progress.batches, initial=state.progress.batch - 1, desc=name, leave=False)
        self.bar.update()
        if time.monotonic() - self.read_at > REFRESH:
            self.bar.set_postfix_str(f"loss {state.progress.loss.item():.4f}", refresh=False)
            self.read_at = time.monotonic()

    def on_epoch(self, state: State, metrics: Mapping[str, Any]) -> None:
        """End the bar, print the epoch."""
        self.close()
        super().on_epoch(state, metrics)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Rich(Plain):
    """Bars for epochs and batches, the running loss, samples/s, time left, the losses as a sparkline."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.losses: list[float] = []
        self.read_at = self.epoch_began = 0.0
        self.console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description:<6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
        self.live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=1 / REFRESH, transient=True
        )

    def render(self) -> RenderableType:
        """The bars, and under them the losses of the epochs so far."""
        from rich.console import Group
        from rich.text import Text

        return Group(self.bars, Text(f"losses {sparkline(self.losses)}")) if self.losses else self.bars

    def say(self, text: str) -> None:
        """Print above the bars."""
        self.console.print(text, markup=False, soft_wrap=True)

    def on_start(self, state: State) -> None:
        """Show the bars."""
        self.epochs = self.bars.add_task("epoch", total=state.settings.epochs, completed=state.progress.epoch, text="")
        self.batches = self.bars.add_task("batch", total=state.progress.batches, text="")
        self.live.start()
        self.epoch_began, self.begun_at = time.monotonic(), state.progress.batch

    def on_step(self, state: State) -> None:
        """Move the batch bar on, and read the running loss now and then."""
        now = time.monotonic()
        if now - self.read_at < REFRESH:
            return
        self.read_at = now
        loss = state.progress.loss.item()
        done_here = (state.progress.batch - self.begun_at) / state.progress.batches
        rate = done_here * state.progress.samples / max(now - self.epoch_began, 1e-9)
        self.bars.update(self.batches, completed=state.progress.batch, text=f"loss {loss:.4f}  {rate:,.0f} samples/s")
        self.bars.update(self.epochs, completed=state.progress.epoch + state.progress.batch / state.progress.batches)

    def on_epoch(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Print the epoch above the bars, which start again."""
        self.losses.append(metrics["train/loss"])
        super().on_epoch(state, metrics)
        self.bars.update(self.epochs, completed=state.progress.epoch, text=f"loss {metrics['train/loss']:.4f}")
        self.bars.reset(self.batches, total=state.progress.batches, text="")
        self.epoch_began, self.begun_at = time.monotonic(), 0

    def close(self) -> None:
        """Take the bars away; the lines stay."""
        self.live.stop()
