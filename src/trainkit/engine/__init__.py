"""One run from config to result: train, resume, load its model, and explain the errors of user code."""
