"""From settings to objects: data, model, loss, optimizers, schedulers, hooks."""
