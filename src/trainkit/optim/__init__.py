"""Optimizers and schedulers over param groups that rules make.

`params` lists the parameters of a model by name, `layers` numbers the layers, `rules` checks and matches rules,
and `groups` resolves rules to groups. `chained` combines several optimizers. `schedulers` keeps the ratios of
learning rates between groups. `optimizer_state` saves optimizers by the names of their parameters.
"""

from trainkit.optim.chained import ChainedOptimizer
from trainkit.optim.group_table import param_table
from trainkit.optim.groups import Group, resolve_groups
from trainkit.optim.layers import model_layers
from trainkit.optim.params import Param, named_params
from trainkit.optim.rules import OptimizerOptions
from trainkit.optim.schedulers import Scheduler, keep_group_ratios

__all__ = [
    "ChainedOptimizer",
    "Group",
    "OptimizerOptions",
    "Param",
    "Scheduler",
    "keep_group_ratios",
    "model_layers",
    "named_params",
    "param_table",
    "resolve_groups",
]
