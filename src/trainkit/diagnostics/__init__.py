"""Commands that analyse a training without keeping it: bench, inspect, find-lr, verify-resume."""
