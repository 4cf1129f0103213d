"""A rank of `benchmarks.ranks`: train the config in a variable."""

from __future__ import annotations

import os

import trainkit
from benchmarks.ranks import OVERRIDES

trainkit.train(trainkit.compose(os.environ[OVERRIDES].splitlines()))
