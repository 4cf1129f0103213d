"""The command `check`: all errors of a training, its path with one batch, and estimates of its time and memory."""
