"""From a checked config to objects: data, model, loss, optimizers, schedulers, hooks."""
