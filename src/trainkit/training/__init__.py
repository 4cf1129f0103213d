"""The heart: the state of a training, its loop and its step. Nothing here knows the config, Hydra or rich."""
