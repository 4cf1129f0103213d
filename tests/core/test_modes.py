"""Training mode and evaluation mode of modules."""

from __future__ import annotations

import torch
from torch import nn

from trainkit.core.modes import evaluating


def test_modules_return_to_the_mode_that_they_had() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False]
