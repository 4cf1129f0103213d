"""From the command line to checked, typed settings. Nothing here imports torch."""
