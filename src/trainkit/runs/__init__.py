"""A run on disk: its directory, history, checkpoints and lock."""
