"""The shipped models that are more than a stack of torch's layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trainkit.data.shapes import shapes
from trainkit.models import GPT, UNet


@pytest.fixture
def tokens() -> Tensor:
    """Random tokens (3, 16) of a vocabulary of 20."""
    return torch.randint(20, (3, 16), generator=torch.Generator().manual_seed(0))


def test_gpt_predicts_each_token_from_the_tokens_before_it(tokens: Tensor) -> None:
    model = GPT(20, context=16, depth=2, heads=2, width=8).eval()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 20
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:], after[:, :, 9:])


def test_a_gpt_block_is_the_encoder_layer_of_torch_with_a_causal_mask() -> None:
    block = GPT(20, depth=1, heads=2, width=8).blocks[0]
    assert isinstance(block, nn.Module)
    layer = nn.TransformerEncoderLayer(
        8, 2, dim_feedforward=32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_": "attend.",
        "self_attn.out_proj.": "project.",
        "linear1.": "grow.",
        "linear2.": "shrink.",
    }
    state = block.state_dict()
    for theirs in layer.state_dict():
        ours = theirs
        for old, new in names.items():
            ours = ours.replace(old, new)
        layer.state_dict()[theirs].copy_(state[ours])
    stream = torch.randn(3, 16, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(16)
    torch.testing.assert_close(block(stream), layer(stream, src_mask=mask, is_causal=True))


def test_gpt_begins_at_the_entropy_of_its_vocabulary(tokens: Tensor) -> None:
    loss = nn.functional.cross_entropy(GPT(20, context=16)(tokens), tokens.roll(-1, 1))
    assert loss.item() == pytest.approx(math.log(20), abs=0.2)


def test_gpt_names_a_sequence_that_is_too_long(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="the sequences have 16 tokens, and context=8"):
        GPT(20, context=8)(tokens)


def test_unet_classifies_each_pixel_by_its_surroundings() -> None:
    torch.manual_seed(0)
    model = UNet(in_channels=3, num_classes=4, width=4, depth=3).eval()
    images = torch.rand(2, 3, 32, 48, requires_grad=True)
    logits = model(images)
    assert logits.shape == (2, 4, 32, 48)
    logits[0, :, 10, 20].sum().backward()
    assert images.grad is not None
    assert (images.grad[0] != 0).any(dim=0).sum() > 100
    assert not images.grad[1].any()


def test_shapes_have_the_classes_of_their_pixels() -> None:
    data = shapes(size=50, pixels=32, shapes=1, noise=0.0)
    images, classes = data.tensors
    assert images.shape == (50, 3, 32, 32)
    assert set(classes.unique().tolist()) == {0, 1, 2, 3}
    for image, pixels in zip(images, classes, strict=True):  # one color for the background, one for the shape
        for kind in pixels.unique().tolist():
            assert len(image[:, pixels == kind].unique(dim=1).T) == 1
    areas = [float((pixels == 1).sum()) for pixels in classes if (pixels == 1).any()]
    assert max(areas) == pytest.approx(math.pi * (32 * 0.25) ** 2, rel=0.2)
    assert torch.equal(shapes(size=50, pixels=32, shapes=1, noise=0.0).tensors[1], classes)
