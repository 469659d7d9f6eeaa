"""Example inputs: cutting them, copying them, labels."""

from __future__ import annotations

import torch

from lightning_accel.inputs import copy_inputs, first_rows, split_inputs, without_labels


def test_the_first_rows_and_tokens_of_a_batch() -> None:
    batch = {"input_ids": torch.arange(40).view(4, 10), "attention_mask": torch.ones(4, 10)}
    few = first_rows(batch, 2, length=3)
    assert few["input_ids"].tolist() == [[0, 1, 2], [10, 11, 12]] and few["attention_mask"].shape == (2, 3)
    assert first_rows((torch.zeros(3, 5), "mean"), 2)[1] == "mean"
    assert first_rows((torch.zeros(1, 5),), 2)[0].shape == (1, 5)


def test_inputs_without_a_common_batch_are_left() -> None:
    inputs = (torch.zeros(4, 5), torch.zeros(3))
    assert [t.shape[0] for t in first_rows(inputs, 2)] == [4, 3]
    assert [t.shape for t in first_rows((torch.zeros(4, 5), torch.zeros(4)), 2, length=3)] == [(2, 5), (2,)]
    assert first_rows((torch.tensor(1.0),), 2)[0].item() == 1.0


def test_tuples_are_positional_dicts_are_by_name_and_copies_are_copies() -> None:
    x = torch.zeros(2)
    assert split_inputs((x,)) == ((x,), {}) and split_inputs({"x": x}) == ((), {"x": x}) and split_inputs(x)[0][0] is x
    copy_inputs({"x": x})[1]["x"].add_(1)
    assert x.sum() == 0
    assert without_labels({"input_ids": 1, "labels": 2, "label": 3}) == {"input_ids": 1}
