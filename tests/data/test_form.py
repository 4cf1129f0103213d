"""What of a sample becomes the inputs and the targets; `pad` and `lists`."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset

from tests.helpers import CPU, ItemDataset
from trainkit.core.pytree import Samples, take_samples
from trainkit.data.collate import Pad, lists
from trainkit.data.form import PAIRS, SampleForm
from trainkit.data.loaders import make_loader
from trainkit.data.prepare import Prepare
from trainkit.data.reading import ReadSamples, collate
from trainkit.data.sample_errors import SampleFormError, key_of_sample_error
from trainkit.data.store import Store

Named = namedtuple("Named", ["image", "mask", "weight"])
IMAGE, MASK = torch.ones(2), torch.zeros(2)
SAMPLE = {"image": IMAGE, "id": 7, "label": 3}


@pytest.mark.parametrize(
    ("form", "sample", "expected"),
    [
        (PAIRS, (1, 2), (1, 2)),
        (PAIRS, SAMPLE, ({"image": IMAGE, "id": 7}, 3)),
        (PAIRS, {"image": IMAGE, "label": 3}, (IMAGE, 3)),
        (PAIRS, {"y": 1, "labels": 2, "x": 3}, ({"y": 1, "x": 3}, 2)),
        (SampleForm("image", "id"), SAMPLE, (IMAGE, 7)),
        (SampleForm(["image"]), SAMPLE, ({"image": IMAGE}, 3)),
        (SampleForm("id", ["id", "label"]), SAMPLE, (7, {"id": 7, "label": 3})),
        (SampleForm(["image", "label"], "label"), SAMPLE, ({"image": IMAGE, "label": 3}, 3)),
        (SampleForm(targets_too=True), SAMPLE, (SAMPLE, 3)),
        (SampleForm([0, 1], 2), (4, 5, 6), ((4, 5), 6)),
        (SampleForm(targets=0), (4, 5, 6), ((5, 6), 4)),
        (SampleForm(1), (4, 5), (5, 4)),
        (SampleForm("image", "mask"), Named(1, 2, 3), (1, 2)),
        (SampleForm(0, 2), Named(1, 2, 3), (1, 3)),
    ],
)
def test_inputs_and_targets_are_parts_of_a_sample(form: SampleForm, sample: Any, expected: Any) -> None:
    assert form.pair(sample, None) == expected


@pytest.mark.parametrize(
    ("form", "sample"), [(PAIRS, IMAGE), (SampleForm(0, 0), (IMAGE,)), (SampleForm("image", "image"), SAMPLE)]
)
def test_the_target_of_a_bare_tensor_and_of_one_key_is_the_same_object(form: SampleForm, sample: Any) -> None:
    inputs, targets = form.pair(sample, None)
    assert inputs is targets is IMAGE


@pytest.mark.parametrize(
    ("form", "sample", "message"),
    [
        (SampleForm(targets="lebel"), SAMPLE, "data.targets=lebel: .* the keys 'image', 'id', 'label'; fix: .*=label"),
        (SampleForm("x"), IMAGE, r"data.inputs=x: the samples of .* are a Tensor \(2,\) float32, without keys"),
        (SampleForm(5), (1, 2, 3), "data.inputs=5: .* have 3 values"),
        (SampleForm(0), (1, 2, 3), "it is unknown which are the targets; fix: for example data.inputs=0"),
        (PAIRS, {"image": 1, "mask": 2}, "none is a known name of the targets; fix: write data.targets=KEY"),
    ],
)
def test_a_wrong_key_is_an_error_that_lists_the_keys(form: SampleForm, sample: Any, message: str) -> None:
    with pytest.raises(SampleFormError, match=message):
        form.pair(sample, None)


def test_a_tensor_data_set_of_three_tensors_is_sliced_by_positions() -> None:
    x, z, y = torch.randn(10, 3), torch.randn(10, 2), torch.arange(10)
    form = SampleForm([0, 1], 2)
    store = Store.of(TensorDataset(x, z, y), form)
    assert store.tensors is not None
    streamed = Store(TensorDataset(x, z, y), form=form)
    batches = [next(make_loader(s, Prepare(CPU), batch_size=4, seed=3).batches(0)) for s in (store, streamed)]
    for (inputs, targets), (others, other_targets) in [batches]:
        assert torch.equal(targets, other_targets)
        assert all(torch.equal(a, b) for a, b in zip(inputs, others, strict=True))
        assert torch.equal(inputs[0], x[targets])


def batch_of(samples: list[Any], form: SampleForm = PAIRS) -> tuple[Any, Any]:
    """Return the inputs and targets of a batch."""
    return collate(ReadSamples(None, samples, [*range(len(samples))], []), form).pair


def test_strings_and_other_values_are_kept_in_lists() -> None:
    inputs, targets = batch_of([({"text": "a", "none": None}, "x"), ({"text": "b", "none": None}, "y")])
    assert inputs == {"text": ["a", "b"], "none": [None, None]}
    assert [*targets] == ["x", "y"]


def test_micro_batches_slice_tensors_samples_and_lists_of_strings() -> None:
    batch = {"x": torch.arange(4), "text": [*"abcd"], "boxes": Samples([torch.ones(n) for n in range(4)]), "k": 3}
    part = take_samples(batch, 1, 3, 4)
    assert part["x"].tolist() == [1, 2]
    assert part["text"] == ["b", "c"]
    assert isinstance(part["boxes"], Samples)
    assert [len(boxes) for boxes in part["boxes"]] == [1, 2]
    assert part["k"] == 3


def as_list(sequence: Tensor) -> Any:
    """Return a sequence as a list of numbers."""
    return sequence.tolist()


@pytest.mark.parametrize("form", [as_list, np.asarray, torch.as_tensor])
def test_pad_equals_pad_sequence_of_torch(form: Any) -> None:
    torch.manual_seed(0)
    sequences = [torch.randint(1, 9, (n,)) for n in (3, 1, 5)]
    labels = [torch.randint(0, 2, (n,)) for n in (3, 1, 5)]
    samples = [{"ids": form(s), "labels": form(la), "id": n} for n, (s, la) in enumerate(zip(sequences, labels))]  # noqa: B905
    batch = Pad(values={"labels": -100}, lengths="lengths")(samples)
    assert torch.equal(batch["ids"], pad_sequence(sequences, batch_first=True))
    assert torch.equal(batch["labels"], pad_sequence(labels, batch_first=True, padding_value=-100))
    assert batch["id"].tolist() == [0, 1, 2]
    assert batch["lengths"].tolist() == [3, 1, 5]


def test_pad_makes_pairs_and_adds_the_lengths_to_their_inputs() -> None:
    samples = [(torch.ones(n, 2), n) for n in (2, 3)]
    (inputs, lengths), targets = Pad(lengths="lengths")(samples)
    assert torch.equal(inputs, pad_sequence([s[0] for s in samples], batch_first=True))
    assert (lengths.tolist(), targets.tolist()) == ([2, 3], [2, 3])


def test_an_empty_sequence_is_padded_with_the_dtype_of_the_others() -> None:
    padded = Pad()([{"ids": []}, {"ids": [1, 2]}])["ids"]
    assert padded.tolist() == [[0, 0], [1, 2]]
    assert padded.dtype == torch.int64


def test_lists_keeps_an_entry_per_sample_and_makes_a_tensor_of_numbers() -> None:
    images, targets = batch_of([(torch.ones(3, n, n), n) for n in (2, 4)], SampleForm(collate=lists))
    assert isinstance(images, Samples)
    assert [tuple(image.shape) for image in images] == [(3, 2, 2), (3, 4, 4)]
    assert targets.tolist() == [2, 4]


def test_images_in_lists_are_scaled_and_normalized_as_images_in_a_tensor() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0.2, 0.4, 0.3])
    prepare = Prepare(CPU, mean, std)
    expected, _ = prepare(images, 0)
    listed, _ = prepare({"images": Samples(images)}, 0)
    assert torch.equal(torch.stack(listed["images"]), expected)


def test_a_data_set_with_a_collate_streams_the_same_batches_with_workers() -> None:
    torch.manual_seed(0)
    sequences = [torch.randint(1, 9, (1 + n % 4,)) for n in range(20)]
    dataset = ItemDataset(lambda index: {"ids": sequences[index], "label": index}, 20)
    store = Store(dataset, form=SampleForm(collate=Pad()))
    for (inputs, targets), (others, _) in zip(
        make_loader(store, Prepare(CPU), batch_size=6, seed=1).batches(2),
        make_loader(store, Prepare(CPU), batch_size=6, seed=1, num_workers=1).batches(2),
        strict=True,
    ):
        assert torch.equal(inputs, pad_sequence([sequences[i] for i in targets], batch_first=True))
        assert torch.equal(inputs, others)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (None, "returns None, and a batch must be a pair"),
        ((1, 2, 3), "returns a tuple of 3 values, and a batch must be a pair"),
        ((torch.tensor(1.0), torch.ones(2)), "the inputs that .* returns for 2 samples are"),
        (([torch.ones(3), torch.ones(3)], torch.ones(2)), "the inputs that .* are a list of 2"),
        ((np.ones((2, 3)), torch.ones(2)), "the inputs that .* are a ndarray"),
        ({"x": torch.ones(2, 3)}, "the keys 'x'"),
    ],
)
def test_a_wrong_batch_of_a_custom_collate_names_its_code(batch: Any, words: str) -> None:
    def custom(samples: list[Any]) -> Any:  # noqa: ARG001
        return batch

    read = ReadSamples(None, [(IMAGE, 0), (IMAGE, 1)], [0, 1], [])
    with pytest.raises(SampleFormError, match=words) as caught:
        collate(read, SampleForm(collate=custom))
    assert "custom (" in str(caught.value)
    assert "test_form.py, line" in str(caught.value)


def test_an_error_in_a_custom_collate_names_the_key_of_the_collate() -> None:
    def custom(samples: list[Any]) -> Any:  # noqa: ARG001
        raise KeyError("oops")

    with pytest.raises(KeyError) as caught:
        collate(ReadSamples(None, [(IMAGE, 0)], [0], []), SampleForm(collate=custom))
    assert key_of_sample_error("data.train", caught.value) == "data.collate"
    assert key_of_sample_error("data.train", KeyError("oops")) == "data.train"
