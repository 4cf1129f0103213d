"""Kill runs, damage their files and fuzz their readers; report every end that is silent or wrong.

    python -m benchmarks.campaign --kills 200 --corruptions 300 --fuzz-seconds 120 --seed 0

A killed run must end with the same bits as an unbroken run. A damaged run must end with the same bits as an undamaged
one, or with a note or a refusal. The exit code is 1 if anything else happens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.damage import DAMAGES, damage_file, files_of
from benchmarks.fuzz import CALL_SECONDS, MAX_MEMORY, fuzz_in_process, mutate
from benchmarks.random_training import Final, differences_of, draw_config, final_of, write_project
from tests.processes import Forks, Process, until
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.directory import Run
from trainkit.runs.untrusted import sha256_of

REFUSALS = (2, 3, 5, 6, 7)
HARMLESS = ("trainkit.log", ".lock", "params.json")  # damage to these files must not be noticed
LIMIT = 20.0  # seconds of a command


class Campaign:
    """The folder, the server of forks, the random generator and the outcomes of a campaign.

    Args:
        folder: the working directory of all commands.
        draw: the source of every random decision.
    """

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        write_project(folder)
        (folder / "commands").mkdir()
        self.forks = Forks(folder / "commands")
        self.run("--help", limit=120)  # returns once the server has imported torch, so the next times are those of runs

    def run(self, *argv: str, limit: float = LIMIT) -> tuple[int | None, Process]:
        """Run a command to its end; return its exit code, or None if it takes more than `limit` seconds."""
        process = self.forks.start(*argv, cwd=self.folder)
        hung = threading.Event()

        def end() -> None:
            hung.set()
            os.kill(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        code = process.wait()
        timer.cancel()
        return None if hung.is_set() else code, process

    def train(self, argv: list[str], name: str) -> Path:
        """Train without a break; return the directory of the run."""
        code, process = self.run(*argv, f"hydra.run.dir={name}", limit=120)
        if code != 0:
            raise RuntimeError(f"trainkit {' '.join(argv)} ended with {code}: {process.stderr}")
        return self.folder / name

    def count(self, part: str, outcome: str) -> None:
        """Count an outcome that is allowed."""
        self.outcomes[part, outcome] += 1

    def fail(self, part: str, outcome: str, details: str) -> None:
        """Count an outcome that is not allowed."""
        self.outcomes[part, f"WRONG: {outcome}"] += 1
        self.failures.append(f"{part}: {outcome}: {details}")
        print(self.failures[-1], file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- kills


def kill_runs(campaign: Campaign, kills: int, runs_per_config: int = 8) -> None:
    """Kill random runs at random moments and resume them until they are completed."""
    done = number = 0
    while done < kills:
        argv, number = draw_config(campaign.draw, by_steps=True), number + 1
        began = time.monotonic()
        wanted = final_of(campaign.train(argv, f"straight{number}"))
        length = time.monotonic() - began
        for attempt in range(runs_per_config):
            if done >= kills:
                break
            run = campaign.folder / f"killed{number}-{attempt}"
            done += kill_run(campaign, argv, run, wanted, length)
            shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(campaign.folder / f"straight{number}")


def kill_run(campaign: Campaign, argv: list[str], run: Path, wanted: Final, length: float) -> int:
    """Train a run, kill it up to 3 times, and compare its end with an unbroken run; return the number of kills."""
    kills = 0
    while True:
        started = (run / "run.json").exists() or (run / "checkpoints").exists()
        command = ["resume", run.name] if started else [*argv, f"hydra.run.dir={run.name}"]
        process = campaign.forks.start(*command, cwd=campaign.folder)
        if kills < 3:
            if campaign.draw.random() < 0.3:  # while files are written
                with contextlib.suppress(TimeoutError):
                    until(lambda: has_temporary_file(run), timeout=length, interval=0.0002)
            else:
                time.sleep(campaign.draw.uniform(0, length))
            with contextlib.suppress(ProcessLookupError):
                process.send(signal.SIGKILL)
        code = process.wait()
        if code != -signal.SIGKILL:
            break
        kills += 1
    if code != 0:
        campaign.fail("kill", f"exit code {code}", f"{' '.join(argv)}: {process.stderr}")
        return kills
    different = differences_of(final_of(run), wanted)
    if different or Run.load(run).info["status"] != "completed":
        campaign.fail("kill", f"another {different or 'status'}", " ".join(argv))
    else:
        campaign.outcomes["kill", "same bits"] += kills
    return kills


def has_temporary_file(run: Path) -> bool:
    """Return whether a file of a run is being written."""
    return bool(next(run.glob("checkpoints/.*.new*"), None) or next(run.glob(".*.new*"), None))


# ----------------------------------------------------------------------------------------- corruption


def make_victims(campaign: Campaign, count: int) -> list[tuple[Path, dict[str, Final]]]:
    """Return run directories, each with the ends of its undamaged continuations by the checkpoint they start from."""
    victims = []
    for number in range(count):
        argv = [*draw_config(campaign.draw), "epochs=2", "checkpoint.keep=2", "checkpoint.every_steps=5"]
        run = campaign.train(argv, f"victim{number}")
        if number % 2:  # a run that was killed within its second epoch
            shutil.rmtree(run)
            argv += ["+hooks.kill={_target_: trainkit.diagnostics.verify_resume.Kill, step: 13}"]
            campaign.run(*argv, f"hydra.run.dir={run.name}")
            config = run / ".hydra" / "config.yaml"
            config.write_text(config.read_text().replace("step: 13", "step: 999"))
            edited = Run.load(run)
            edited.info["config_sha256"] = [sha256_of(config)]
            edited.write_info()
        ends = {}
        for skipped, name in enumerate(Checkpoints(run / "checkpoints").names()):
            copy = campaign.folder / "continued"
            shutil.copytree(run, copy, symlinks=True)
            for newer in Checkpoints(run / "checkpoints").names()[:skipped]:
                (copy / "checkpoints" / newer / "state.pt").write_bytes(b"")  # damaged, as the victim may be
            code, process = campaign.run("resume", copy.name, "epochs=3", "progress=plain")
            if code == 0:
                ends[name] = final_of(copy)
            elif skipped == 0:
                raise RuntimeError(f"an undamaged run cannot be resumed: {process.stderr}")
            shutil.rmtree(copy)
        victims.append((run, ends))
    return victims


def corrupt_runs(campaign: Campaign, corruptions: int) -> None:
    """Damage a random file of a copied run and resume the copy."""
    victims = make_victims(campaign, 4 if corruptions > 50 else 2)
    for _ in range(corruptions):
        run, ends = campaign.draw.choice(victims)
        copy = campaign.folder / "damaged"
        shutil.copytree(run, copy, symlinks=True)
        path = campaign.draw.choice(files_of(copy))
        kind = campaign.draw.choice(DAMAGES)
        details, damaged = damage_file(campaign.draw, copy, path, kind)
        harmless = all(file.name in HARMLESS for file in damaged)
        refused = judge_damaged(campaign, copy, ends, f"{run.name}: {details}", harmless=harmless)
        if refused:
            restore_and_resume(campaign, copy, run, damaged, ends)
        shutil.rmtree(copy)


def judge_damaged(campaign: Campaign, run: Path, ends: dict[str, Final], details: str, *, harmless: bool) -> bool:
    """Resume a damaged run and count its end; return whether the resume was refused."""
    code, process = campaign.run("resume", run.name, "epochs=3", "progress=plain")
    text = process.stderr

    def fail(outcome: str) -> None:
        campaign.fail("corruption", outcome, f"{details}\n{text[-1500:]}")

    if code is None or "Traceback" in text:
        fail("a hang" if code is None else "a traceback")
    elif code in REFUSALS and "error: " in text and not harmless:
        campaign.count("corruption", f"refused ({code})")
        return True
    elif code != 0:
        fail(f"exit code {code}")
    else:
        name = next((line.split()[2].rstrip(":") for line in text.splitlines() if line.startswith("resumed from ")), "")
        newest, notes = next(iter(ends)), [line for line in text.splitlines() if line.startswith("note: ")]
        wanted, noted = ends.get(name), any("damaged" in note or "skipped step" in note for note in notes)
        found = final_of(run)
        different = differences_of(found, wanted) if wanted else f"state: it resumed from {name!r}"
        if different == "best checkpoint" and found[3] is None and noted:
            campaign.count("corruption", "same bits, the damaged best checkpoint is reported")
        elif different:
            fail(f"another {different}")
        elif name != newest and not noted:
            fail("an older checkpoint without a note")
        else:
            campaign.count("corruption", f"same bits{', with a note' if noted else ''}")
    return False


def restore_and_resume(campaign: Campaign, copy: Path, run: Path, damaged: set[Path], ends: dict[str, Final]) -> None:
    """Restore the damaged files of a run whose resume was refused: the run must continue as if undamaged."""
    for file in damaged:
        shutil.copy2(run / file, copy / file)
    code, process = campaign.run("resume", copy.name, "epochs=3", "progress=plain")
    different = differences_of(final_of(copy), next(iter(ends.values()))) if code == 0 else f"exit code {code}"
    if different:
        campaign.fail("corruption", f"a refusal that changed the run: {different}", f"{damaged}\n{process.stderr}")


# ----------------------------------------------------------------------------------------------- fuzz


def fuzz(campaign: Campaign, seconds: float) -> None:
    """Mutate the text files of a run and call everything that reads them; now and then run the command.

    Args:
        campaign: counts the outcomes.
        seconds: after which no further round of 49 calls and one command begins.
    """
    argv = [*draw_config(campaign.draw), "epochs=2", "checkpoint.keep=2"]
    run, resume = campaign.train(argv, "fuzzed"), ["resume", "mutated", "epochs=3", "resume.allow=[config]"]
    shutil.copytree(run, campaign.folder / "mutated", symlinks=True)
    _, baseline = campaign.run(*resume, limit=120)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        folder, seed = campaign.folder / "mutated", campaign.draw.randrange(2**32)
        count, problems = fuzz_in_process(run, folder, seed, calls=49)
        campaign.outcomes["fuzz", "read or refused"] += count - len(problems)
        for problem in problems:
            campaign.fail("fuzz", problem.partition(":")[0], problem)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run, folder, symlinks=True)
        changed = mutate(campaign.draw, folder)
        code, process = campaign.run(*resume)
        excess = excess_of(process, baseline)
        if excess:
            campaign.fail("fuzz", excess, f"{changed}\n{process.stderr[-1500:]}")
        elif code in (0, *REFUSALS) and "Traceback" not in process.stderr:
            campaign.count("fuzz", f"command ended with {code}")
        else:
            name = "a hang of the command" if code is None else f"command ended with {code}"
            campaign.fail("fuzz", name, f"{changed}\n{process.stderr[-1500:]}")
    shutil.rmtree(folder, ignore_errors=True)


def excess_of(process: Process, baseline: Process) -> str:
    """Return what a command used too much of, compared with a resume of undamaged files, or ''."""
    seconds, memory = process.seconds - baseline.seconds, process.peak - baseline.peak
    if seconds > CALL_SECONDS:
        return f"the command took {seconds:.1f} s of CPU time more than an undamaged resume"
    return f"the command took {memory:,} bytes more than an undamaged resume" if memory > MAX_MEMORY * 1024 else ""


def main() -> int:
    """Run the campaign and print a table of its outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--corruptions", type=int, default=100)
    parser.add_argument("--fuzz-seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parts: list[tuple[Callable[[Campaign, Any], None], float]] = [
        (kill_runs, options.kills),
        (corrupt_runs, options.corruptions),
        (fuzz, options.fuzz_seconds),
    ]
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), random.Random(options.seed))
        with contextlib.suppress(KeyboardInterrupt):  # print the outcomes so far
            for part, amount in parts:
                if amount > 0:
                    part(campaign, amount)
        campaign.forks.close()
    print("| part | outcome | number |\n| --- | --- | ---: |")
    for (part_name, outcome), number in sorted(campaign.outcomes.items()):
        print(f"| {part_name} | {outcome} | {number:,} |")
    print(f"seed {options.seed}: {len(campaign.failures)} failures")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
