"""The shipped hooks: sample images and a linear probe."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from trainkit.core.errors import ConfigError
from trainkit.hooks import collect_features, fit_linear_classifier


def test_the_linear_classifier_is_the_logistic_regression_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (90,), generator=generator)
    features = torch.randn(90, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 9.0, 0.1, 1.0])
    features[:, 0] += classes
    classify = fit_linear_classifier(features[:60], classes[:60], penalty=0.01, iterations=500)
    train = (features[:60] - features[:60].mean(0)) / features[:60].std(0)
    test = (features[60:] - features[:60].mean(0)) / features[:60].std(0)
    reference = LogisticRegression(C=1 / (2 * 60 * 0.01), tol=1e-8, max_iter=1000).fit(train, classes[:60])
    assert classify(features[60:]).tolist() == reference.predict(test).tolist()


def test_a_feature_that_never_changes_does_not_disturb_the_linear_classifier() -> None:
    features, classes = torch.tensor([[0.0, 5.0], [1.0, 5.0]], dtype=torch.float64), torch.tensor([0, 1])
    classify = fit_linear_classifier(features, classes, penalty=1e-4, iterations=50)
    assert classify(features).tolist() == [0, 1]


def test_a_probe_of_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a class for each sample"):
        collect_features(nn.Flatten(), iter([(torch.zeros(2, 3), torch.zeros(2))]))
