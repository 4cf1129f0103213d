"""One command per file: `run(argv)` runs the command. `--help` shows the first line of the file's docstring."""
