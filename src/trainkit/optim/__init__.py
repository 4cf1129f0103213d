"""Param groups by rule, and schedulers that keep the ratios between groups."""
