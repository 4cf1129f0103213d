"""The command line: from argv to a command, from errors to exit codes. Nothing here imports torch.

`main` is the place to start reading. Each file in `commands/` is a command.
"""
