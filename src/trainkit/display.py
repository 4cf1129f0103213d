"""What a person sees while it runs: a live display on a terminal, a line an epoch elsewhere.

Each display is a hook of the loop. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trainkit.errors import NonFiniteError
    from trainkit.run import Run
    from trainkit.state import State

REFRESH = 0.1  # seconds between two looks at the running loss, each of which waits for the device
BARS = "▁▂▃▄▅▆▇█"
SHOWN = ("train/loss", "val/loss", "val/accuracy")
WATCHED = ("param/", "grad/")


def make(progress: str) -> Silent:
    """The display that `progress` (auto, rich, tqdm, plain, off) names; auto is rich on a terminal."""
    if progress == "auto":
        progress = "rich" if sys.stderr is not None and sys.stderr.isatty() else "plain"
    if sys.stderr is None:  # closed, as by `2>&-`
        progress = "off"
    return {"rich": Rich, "tqdm": Tqdm, "plain": Plain, "off": Silent}[progress]()


def epoch_line(epochs: int, metrics: Mapping[str, Any]) -> str:
    """An epoch in one line."""
    shown = [f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}"]
    shown += [f"{name} {number(value)}" for name, value in metrics.items() if name in SHOWN]
    shown += [
        f"{name} {number(value)}" for name, value in metrics.items() if name.startswith(WATCHED) and value is not None
    ]
    shown += [f"{metrics['samples_per_second']:,.0f} samples/s", duration(metrics["seconds"])]
    return "  ".join(shown)


def split_line(state: State) -> str:
    """What was done where memory ran out."""
    seen = ", which is what layers with batch statistics see from now on" if state.sees_batches else ""
    return f"note: out of memory at step {state.step + 1}: it is taken again with micro_batch={state.micro_batch}{seen}"


def nonfinite_line(state: State, error: NonFiniteError) -> str:
    """What was done where a loss or a gradient was not finite."""
    done = "the weights of the last checkpoint are back" if state.on_nonfinite == "rollback" else "no update"
    return f"note: {error.problems[0].cause}: left out, {done} ({state.skipped} in this epoch)"


def count(number: int, noun: str) -> str:
    """So many of something."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def number(value: float) -> str:
    """A metric with four digits behind the point, or in powers of ten where those would not do."""
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e6 or value != value else f"{value:.2e}"


def short(path: Path) -> str:
    """A path as one would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


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
    return [f"training on {info['device']}: {', '.join(parts)}", f"run directory: {short(run.directory)}"]


def result(run: Run) -> list[str]:
    """What was reached and where it lies."""
    done = len(run.history)
    reached = "no epoch has a finite loss"
    if run.best is not None:
        values = [f"{name} {number(value)}" for name, value in run.best.items() if name in SHOWN]
        reached = f"epoch {run.best['epoch']}: {', '.join(values)}"
        reached = f"best of {count(done, 'epoch')} by {run.best['metric']}: {reached}"
    early = [run.info["why"]] if run.info["why"] else []
    return [*early, reached, f"history and config: {short(run.directory)}"]


def finished(run: Run) -> list[str]:
    """That nothing is left to do in a run."""
    more = f"to train longer: trainkit resume {short(run.directory)} epochs=N"
    return [f"finished: it has done all of its {count(len(run.history), 'epoch')}; {more}", *result(run)]


def verified(found: Mapping[str, Any], directory: Path) -> list[str]:
    """Whether a training that was killed and resumed ended with the bits of one that was not."""
    kills = f"killed at {'step' if len(found['steps']) == 1 else 'steps'} {', '.join(map(str, found['steps']))}"
    lines = [f"straight  {found['straight']}", f"resumed   {found['resumed']}  ({kills})"]
    if found["equal"]:
        return [*lines, "equal: model, optimizer, schedulers, averages, random states and history, to the last bit"]
    return [*lines, f"DIFFERENT: see {short(directory)}; on a GPU write deterministic=true"]


def comparison(runs: list[Run]) -> list[str]:
    """A sweep's runs in a table, the best first."""
    shared = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    names = {run.directory: " ".join(o for o in run.overrides if o not in shared) for run in runs}
    rows = [(names[run.directory], run.best, short(run.directory)) for run in runs if run.best is not None]
    if not rows:
        return []
    metric = rows[0][1]["metric"]
    rows.sort(key=lambda row: row[1]["value"], reverse=metric == "val/accuracy")
    shown = [name for name in SHOWN if name in rows[0][1]]
    table = [[f"best by {metric}", *shown, "directory"]]
    table += [[name, *(number(best[key]) for key in shown), directory] for name, best, directory in rows]
    return columns(table)


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def value(option: Any) -> str:
    """An option's value in few characters."""
    return f"{option:.6g}" if isinstance(option, float) else str(option)


def _shown_options(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options worth a column: the rate, the decay, and what a rule decides anywhere."""
    names = dict.fromkeys(name for row in params for name in row["options"])
    decided = {name for row in params for name in row["options"] if row["decided_by"][name] != "default"}
    return [name for name in names if name in ("lr", "weight_decay") or name in decided]


def groups(params: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[str]:
    """The param groups in short, a line each: how many tensors and parameters, the options in force.

    Args:
        params: the rows of `optim.table`.
        order: the names of the groups.
    """
    names = _shown_options(params)
    rows = [["param group", "tensors", "parameters", "optimizer", *names]]
    for group in [*order, None]:
        inside = [row for row in params if row["group"] == group]
        if inside:
            options = [value(inside[0]["options"][name]) if name in inside[0]["options"] else "-" for name in names]
            size = f"{sum(row['count'] for row in inside):,}"
            rows.append([group or "(frozen)", str(len(inside)), size, inside[0]["optimizer"] or "-", *options])
    return columns(rows)


def params(params: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every parameter in a line: its group, the options in force, each with the rule that decided it."""
    names = _shown_options(params)
    rows = [["parameter", "shape", "parameters", "layer", "group", "optimizer", *names]]
    for row in params:
        cells = []
        for name in names:
            rule = row["decided_by"].get(name, "default")
            cell = value(row["options"][name]) if name in row["options"] else "-"
            cells.append(cell if rule == "default" else f"{cell} ({rule})")
        shape = "x".join(map(str, row["shape"])) or "()"
        label = " = ".join([row["name"], *row["aliases"]])
        frozen = row["decided_by"].get("freeze", "default")
        group = row["group"] or ("frozen" if frozen == "default" else f"frozen ({frozen})")
        rows.append([label, shape, f"{row['count']:,}", str(row["layer"]), group, row["optimizer"] or "-", *cells])
    trained = [row for row in params if row["trainable"]]
    sizes = [sum(row["count"] for row in some) for some in (params, trained)]
    total = f"{count(len(params), 'tensor')}, {count(sizes[0], 'parameter')}, {sizes[1]:,} of them trained"
    return [*columns(rows), total, "(RULE) decided a value; all else is the optimizer's own"]


def inspection(step: Mapping[str, Any]) -> list[str]:
    """One step taken apart, a line for each parameter."""
    keys = {
        "weight": "weight",
        "grad_before": "grad before",
        "grad": "after backward",
        "grad_twice": "after a second",
        "grad_after_zero": "after zero_grad",
        "update": "update",
        "relative_update": "update/weight",
        "weight_after": "weight after",
    }
    rows = step["parameters"]
    if any(row["finite_difference"] is not None for row in rows):
        keys["finite_difference"] = "finite difference"
    cells = [["parameter", *keys.values()]]
    cells += [[row["name"], *(none_or(row[key]) for key in keys)] for row in rows]
    unused = [row["name"] for row in rows if row["group"] is not None and row["grad"] is None]
    notes = [f"loss {number(step['loss'])} of a batch of {count(step['samples'], 'sample')}"]
    notes.append("one element is shown by its value, several by their norm; gradients add up until they are zeroed")
    if unused:
        notes.append(f"note: the loss does not depend on {', '.join(unused)}")
    return [*columns(cells), *notes]


def as_json(content: Any) -> str:
    """JSON that every reader takes: what is not finite becomes null."""

    def strict(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(content), indent=2, default=str)


def none_or(metric: float | None) -> str:
    """A metric, or none."""
    return "none" if metric is None else number(metric)


def lr_found(found: Mapping[str, Any]) -> list[str]:
    """What a learning-rate range test found."""
    tried = "no rate gave a finite loss"
    if found["rates"]:
        tried = f"tried {count(len(found['rates']), 'rate')} from {found['rates'][0]:.2g} to {found['rates'][-1]:.2g}"
        tried += ", where the loss ran away" if found["diverged"] else ""
    lines = [tried, f"curve: {found['picture']}"]
    if found["suggestion"] is None:
        return [*lines, "no suggestion: no clear fall of the loss; try another --start and --end, or more --steps"]
    if len(found["groups"]) > 1:
        lines += columns([[f"lr/{name}", f"{rate:.2g}"] for name, rate in found["groups"].items()])
    return [*lines, f"the loss fell fastest at lr={found['suggestion']:.2g}"]


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
        self.say(epoch_line(state.epochs, metrics))

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
            name = f"epoch {state.epoch + 1}/{state.epochs}"
            self.bar = self.tqdm(total=state.batches, initial=state.batch - 1, desc=name, leave=False)
        self.bar.update()
        if time.monotonic() - self.read_at > REFRESH:
            self.bar.set_postfix_str(f"loss {state.loss.item():.4f}", refresh=False)
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
        self.epochs = self.bars.add_task("epoch", total=state.epochs, completed=state.epoch, text="")
        self.batches = self.bars.add_task("batch", total=state.batches, text="")
        self.live.start()
        self.epoch_began, self.begun_at = time.monotonic(), state.batch

    def on_step(self, state: State) -> None:
        """Move the batch bar on, and read the running loss now and then."""
        now = time.monotonic()
        if now - self.read_at < REFRESH:
            return
        self.read_at = now
        loss = state.loss.item()
        done_here = (state.batch - self.begun_at) / state.batches
        rate = done_here * state.samples / max(now - self.epoch_began, 1e-9)
        self.bars.update(self.batches, completed=state.batch, text=f"loss {loss:.4f}  {rate:,.0f} samples/s")
        self.bars.update(self.epochs, completed=state.epoch + state.batch / state.batches)

    def on_epoch(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Print the epoch above the bars, which start again."""
        self.losses.append(metrics["train/loss"])
        super().on_epoch(state, metrics)
        self.bars.update(self.epochs, completed=state.epoch, text=f"loss {metrics['train/loss']:.4f}")
        self.bars.reset(self.batches, total=state.batches, text="")
        self.epoch_began, self.begun_at = time.monotonic(), 0

    def close(self) -> None:
        """Take the bars away; the lines stay."""
        self.live.stop()
