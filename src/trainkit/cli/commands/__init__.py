"""One verb per file: `run(argv)` is the command, its docstring's first line what `--help` says."""
