"""The command line: from argv to a command, from errors to exit codes. Nothing here imports torch."""
