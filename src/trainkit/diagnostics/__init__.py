"""Commands that look into a training: bench, inspect, find-lr, verify-resume."""
