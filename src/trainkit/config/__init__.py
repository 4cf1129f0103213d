"""From the command line to checked, typed settings. Nothing here imports torch.

`compose` is the place to start reading: it composes a config with Hydra, and `diagnose` finds why Hydra cannot.
`check`, `consistency`, `static_targets` and `targets` find what is wrong with a config. `schema` lists the keys with
their types. `settings` turns a checked config into frozen `Settings`, which all other folders use.

Nothing is imported here, so that `--help` starts without Hydra.
"""
