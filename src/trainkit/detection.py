"""Detection of objects: a small Faster R-CNN of torchvision, its steps, and the mean average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # of COCO
RECALLS = np.linspace(0.0, 1.0, 101)  # numpy's rounding decides whether a recall of 7 / 20 reaches 0.35
MAX_DETECTIONS = 100  # of an image and a class

Targets = tuple[Tensor, Tensor]  # boxes (N, K, 4) and classes (N, K), 0 for no object


def faster_rcnn(num_classes: int, pixels: int, width: int = 32) -> nn.Module:
    """Return a Faster R-CNN of torchvision for small images: https://arxiv.org/abs/1506.01497.

    Args:
        num_classes: including the background, class 0.
        pixels: the smaller side of an image, which is not scaled.
        width: channels of the first convolution of the backbone, which starts from random weights.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    backbone = _backbone(width)
    hidden, cells = 4 * width, 5
    counts = {"rpn_pre_nms_top_n_train": 100, "rpn_pre_nms_top_n_test": 100, "box_batch_size_per_image": 32}
    counts |= {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 30, "rpn_batch_size_per_image": 64}
    model: nn.Module = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((12, 18, 26),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], cells, 2),
        box_head=TwoMLPHead(2 * width * cells**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, num_classes),
        min_size=pixels,
        max_size=2 * pixels,
        **counts,
    )
    return model


def _backbone(width: int) -> nn.Module:
    """Return four convolutions with batch norm, which halve the image twice."""
    layers: list[nn.Module] = []
    channels = (3, width, width, 2 * width, 2 * width)
    for before, after, stride in zip(channels[:-1], channels[1:], (2, 1, 2, 1), strict=True):
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    backbone: Any = nn.Sequential(*layers)
    backbone.out_channels = 2 * width
    module: nn.Module = backbone
    return module


def training_step(model: nn.Module, images: Tensor, targets: Targets, loss_fn: nn.Module) -> dict[str, Any]:  # noqa: ARG001
    """Return the sum of the losses that the model computes, and each of them.

    Args:
        model: a detection model of torchvision.
        images: (N, C, H, W).
        targets: boxes and classes.
        loss_fn: not used.
    """
    losses = model(list(images), objects_in(targets))
    return {"loss": torch.stack([*losses.values()]).sum(), **losses}


def evaluation_step(model: nn.Module, images: Tensor, targets: Targets, loss_fn: nn.Module) -> dict[str, Any]:
    """Return the loss of `training_step` and the detections. Batch norm uses its running statistics for both."""
    detections = model(list(images))
    parts: list[Any] = [model, model.rpn, model.roi_heads]
    try:
        for part in parts:  # only with this flag the model computes losses
            part.training = True
        losses = training_step(model, images, targets, loss_fn)
    finally:
        for part in parts:
            part.training = False
    return {**losses, "outputs": detections}


def objects_in(targets: Targets) -> list[dict[str, Tensor]]:
    """Return the boxes and the classes of the objects in each image."""
    return [{"boxes": boxes[labels > 0], "labels": labels[labels > 0]} for boxes, labels in zip(*targets, strict=True)]


class MeanAveragePrecision:
    """The average precision, averaged over classes and overlaps from 0.5 to 0.95, as COCO computes it.

    Args:
        thresholds: overlaps (intersection over union) from which a detection is right.
    """

    higher_is_better: ClassVar[bool] = True

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS) -> None:
        self.thresholds = tuple(thresholds)
        self.reset()

    def reset(self) -> None:
        """Start again, with no image."""
        self.scores: dict[int, list[Tensor]] = {}  # class -> for each image the scores of the detections
        self.hits: dict[int, list[Tensor]] = {}  # class -> for each image (thresholds, detections)
        self.objects: dict[int, int] = {}  # class -> number

    def update(self, outputs: Sequence[Mapping[str, Tensor]], targets: Targets) -> None:
        """Add the detections of a batch: boxes, scores and labels of each image."""
        for found, true in zip(outputs, objects_in(targets), strict=True):
            for label in torch.cat([found["labels"], true["labels"]]).unique().tolist():
                chosen, objects = found["labels"] == label, true["boxes"][true["labels"] == label]
                scores, order = found["scores"][chosen].sort(descending=True, stable=True)
                boxes = found["boxes"][chosen][order][:MAX_DETECTIONS]
                self.scores.setdefault(label, []).append(scores[:MAX_DETECTIONS].double().cpu())
                self.hits.setdefault(label, []).append(self._hits(boxes, objects).cpu())
                self.objects[label] = self.objects.get(label, 0) + len(objects)

    def _hits(self, boxes: Tensor, objects: Tensor) -> Tensor:
        """Return which detections are right, (thresholds, detections): each takes the best object that is left."""
        from torchvision.ops import box_iou

        hits = torch.zeros(len(self.thresholds), len(boxes), dtype=torch.bool)
        overlaps = box_iou(boxes.double(), objects.double()).tolist()
        for row, threshold in enumerate(self.thresholds):
            left = set(range(len(objects)))
            for number, overlap in enumerate(overlaps):
                best = max(left, key=overlap.__getitem__, default=None)
                if best is not None and overlap[best] >= threshold:
                    hits[row, number] = True
                    left.remove(best)
        return hits

    def compute(self) -> Tensor:
        """Return the mean; NaN if there is no object."""
        values = [self._average_precision(label) for label, count in sorted(self.objects.items()) if count]
        return torch.stack(values).mean() if values else torch.tensor(float("nan"))

    def _average_precision(self, label: int) -> Tensor:
        """Return the mean over thresholds of the precision at `RECALLS` recalls of a class."""
        order = torch.cat(self.scores[label]).argsort(descending=True, stable=True)
        right = torch.cat(self.hits[label], 1)[:, order].double().cumsum(1)
        recall, precision = right / self.objects[label], right / torch.arange(1, right.shape[1] + 1)
        precision = precision.flip(1).cummax(1).values.flip(1)  # the best precision at this recall or a higher one
        precision = torch.cat([precision, torch.zeros(len(right), 1, dtype=torch.float64)], 1)
        levels = torch.from_numpy(RECALLS).expand(len(right), -1).contiguous()
        return precision.gather(1, torch.searchsorted(recall.contiguous(), levels)).mean()

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted."""
        return {"scores": dict(self.scores), "hits": dict(self.hits), "objects": dict(self.objects)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what was counted."""
        self.scores, self.hits = ({k: [*v] for k, v in saved[name].items()} for name in ("scores", "hits"))
        self.objects = dict(saved["objects"])
