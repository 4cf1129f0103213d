"""Detection: boxes that fit the shapes, the mean average precision of COCO, and exact runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainkit
from trainkit.data import boxes
from trainkit.detection import RECALLS, THRESHOLDS, MeanAveragePrecision, faster_rcnn, objects_in, training_step
from trainkit.runs.directory import Run

SHORT = ["experiment=detection", "data.train.size=24", "batch_size=4", "limit_batches=2", "model.width=8"]
SHORT += ["epochs=2", "progress=off", "scheduler=none"]


def detections(seed: int, images: int = 12) -> tuple[list[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """Return detections near random objects and elsewhere, and the objects."""
    generator = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(images, 5, 2, generator=generator)
    true = torch.cat([corner, corner + 20 + 20 * torch.rand(images, 5, 2, generator=generator)], 2)
    classes = torch.randint(0, 4, (images, 5), generator=generator)
    outputs = []
    for number in range(images):
        moved = true[number].repeat(3, 1) + torch.randn(15, 4, generator=generator) * 2
        labels = classes[number].repeat(3).clamp(min=1)
        outputs.append({"boxes": moved, "labels": labels, "scores": torch.rand(15, generator=generator)})
    return outputs, (true, classes)


def test_the_boxes_are_those_of_the_shapes() -> None:
    images, found, classes = boxes(size=20, pixels=64, noise=0).tensors
    drawn = (images > 0.35 * 255).all(1)
    for image, places, kinds in zip(drawn, found, classes, strict=True):
        for place in places[kinds > 0]:
            x1, y1, x2, y2 = place.floor().int().tolist()
            y, x = image[y1 : y2 + 1, x1 : x2 + 1].nonzero().T
            tight = torch.stack([x1 + x.min(), y1 + y.min(), x1 + x.max() + 1, y1 + y.max() + 1])
            assert (tight - place).abs().max() < 2
            image[y1 : y2 + 1, x1 : x2 + 1] = False
        assert not image.any()


@pytest.mark.parametrize("seed", range(4))
def test_the_mean_average_precision_is_that_of_torchmetrics(seed: int) -> None:
    pytest.importorskip("pycocotools")
    detection = pytest.importorskip("torchmetrics.detection")
    reference, metric = (
        detection.MeanAveragePrecision(iou_thresholds=[*THRESHOLDS], rec_thresholds=RECALLS.tolist()),
        MeanAveragePrecision(),
    )
    for part in range(2):
        outputs, targets = detections(2 * seed + part)
        metric.update(outputs, targets)
        reference.update(outputs, objects_in(targets))
    assert float(metric.compute()) == pytest.approx(float(reference.compute()["map"]), abs=1e-6)


def test_perfect_detections_have_a_mean_average_precision_of_1_and_none_has_0() -> None:
    _, targets = detections(0)
    perfect = [{**found, "scores": torch.ones(len(found["labels"]))} for found in objects_in(targets)]
    nothing = [{name: tensor[:0] for name, tensor in found.items()} for found in perfect]
    for outputs, expected in ((perfect, 1.0), (nothing, 0.0)):
        metric = MeanAveragePrecision()
        metric.update(outputs, targets)
        assert float(metric.compute()) == expected


def test_a_metric_continues_from_its_state() -> None:
    whole, first, second = MeanAveragePrecision(), MeanAveragePrecision(), MeanAveragePrecision()
    whole.update(*detections(0))
    first.update(*detections(0))
    second.load_state_dict(first.state_dict())
    for metric in (whole, second):
        metric.update(*detections(1))
    assert torch.equal(whole.compute(), second.compute())


def test_the_loss_is_the_sum_of_the_losses_of_torchvision() -> None:
    images, found, classes = boxes(size=2).tensors
    model, inputs = faster_rcnn(4, 64, width=8), images / 255
    torch.manual_seed(0)
    result = training_step(model, inputs, (found, classes), torch.nn.Identity())
    torch.manual_seed(0)
    losses = model(list(inputs), objects_in((found, classes)))
    torch.testing.assert_close(result["loss"], sum(losses.values()))
    assert losses.keys() < result.keys()


def numbers(run: Run) -> list[Any]:
    """Return the losses and the metrics of each epoch."""
    return [[value for name, value in row.items() if "/" in name] for row in run.history]


def test_a_resumed_run_equals_a_run_that_was_not_stopped(here: Path) -> None:
    whole = trainkit.train(trainkit.compose(SHORT), directory=here / "whole")
    trainkit.train(trainkit.compose([*SHORT, "epochs=1"]), directory=here / "parts")
    parts = trainkit.resume(here / "parts", ["epochs=2"])
    assert numbers(parts) == numbers(whole)
    assert "val/map" in whole.history[-1]
