"""Count the instructions of a training step: by trainkit, and by the same parts in five lines.

    python -m benchmarks.instructions [--steps 20]

Times of short steps are noisy, and counts are not. Valgrind's callgrind counts the instructions of a process that
trains some steps, and of one that trains twice as many. The difference is that of the steps alone. A process takes a
minute or more, because valgrind emulates the processor. It counts from the first of these steps on: the imports would
take ten times as long if they were counted. It has no AVX-512, so the kernels are those for AVX2.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

from benchmarks.interleave import describe_machine, markdown_table

CONFIGS = {
    "toy CNN, 32 samples": ["model=toy_cnn", "batch_size=32"],
    "tiny MLP, 32 samples": ["model=mlp", "model.hidden=[8]", "batch_size=32"],
}
LOOPS = ("trainkit", "bare")
WARM_UP = 5
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "PYTHONHASHSEED": "0",
}


def main() -> None:
    """Count both loops of each config, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--configs", nargs="+", default=[*CONFIGS], choices=[*CONFIGS])
    parser.add_argument("--child", nargs=3, metavar=("CONFIG", "LOOP", "STEPS"))
    args = parser.parse_args()
    if args.child:
        train(args.child[0], args.child[1], int(args.child[2]))
        return
    rows = []
    for config in args.configs:
        counts = {loop: instructions_per_step(config, loop, args.steps) for loop in LOOPS}
        extra = counts["trainkit"] - counts["bare"]
        millions = [f"{count / 1e6:,.2f}" for count in (counts["bare"], counts["trainkit"], extra)]
        rows.append([config, *millions, f"{extra / counts['bare']:.1%}"])
    print(f"{describe_machine()}; valgrind, {args.steps} steps\n")
    print(markdown_table(["config", "bare, millions", "trainkit, millions", "difference", "share"], rows))


def instructions_per_step(config: str, loop: str, steps: int) -> float:
    """Return the instructions of a step of a loop."""
    few, many = (count_instructions(config, loop, number) for number in (steps, 2 * steps))
    return (many - few) / steps


def count_instructions(config: str, loop: str, steps: int) -> int:
    """Return the instructions of a process that trains some steps."""
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null", sys.executable]
    child = ["-m", "benchmarks.instructions", "--child", config, loop, str(steps)]
    done = subprocess.run([*command, *child], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        raise SystemExit(f"{' '.join(child)} failed:\n{done.stderr[-2000:]}")
    return int(found[1])


def train(config: str, loop: str, steps: int) -> None:
    """Train some steps by one of the loops."""
    from trainkit.build.session import build_session
    from trainkit.config.compose import compose_run
    from trainkit.diagnostics.batches import FixedStepsLoader
    from trainkit.diagnostics.bench import run_bare_loop
    from trainkit.diagnostics.phases import run_trainkit_loop

    session = build_session(compose_run(CONFIGS[config]).settings, lambda *_: None)
    run = run_trainkit_loop if loop == "trainkit" else run_bare_loop
    run(session.state, FixedStepsLoader(session.train, WARM_UP))
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, capture_output=True)
    run(session.state, FixedStepsLoader(session.train, steps))
    sys.stdout.flush()
    os._exit(0)  # the rest would be counted too


if __name__ == "__main__":
    main()
