"""One run from config to result: train, resume, and which config key raised an error."""
