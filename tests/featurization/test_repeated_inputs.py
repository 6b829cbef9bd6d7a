"""Duplicates within a split, and rows of one split in another."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import gradstore as gs
from gradstore.featurization import repeated_inputs as module
from gradstore.featurization.repeated_inputs import repeated_inputs
from gradstore.featurization.trial import checks

X = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))


def project(**splits: torch.Tensor | Dataset) -> gs.Project:
    sets = {
        n: TensorDataset(x, torch.arange(len(x)) % 3) if isinstance(x, torch.Tensor) else x for n, x in splits.items()
    }
    return gs.Project(model=nn.Linear(4, 3), splits=sets)


def test_what_occurs_twice_is_named() -> None:
    doubled = X.clone()
    doubled[[70, 150]] = X[[12, 12]]
    doubled[90] = X[33]
    found = repeated_inputs(project(train=doubled, test=torch.cat([X[100:105] + 1, X[5:8]])), "train")
    assert found == (
        "all 200 inputs: 3 the same as an earlier one; such as rows 12 and 70; "
        "3 of 8 of split 'test' are among them, row 5 first"
    )
    assert repeated_inputs(project(train=X, test=X + 1), "train") == "all 200 inputs: no two the same"
    labels = project(train=TensorDataset(torch.cat([X, X[:1]]), torch.arange(201) % 3))
    assert repeated_inputs(labels, "train").endswith("1 the same as an earlier one; such as rows 0 and 200")


def test_no_more_is_read_than_the_time_allows() -> None:
    assert repeated_inputs(project(train=X), "train", 0.0) == "64 of 200 inputs read: no two the same"


class Broken(Dataset):
    def __init__(self, *broken: int, n: int = 3) -> None:
        self.broken, self.n = broken, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i in self.broken:
            raise OSError("gone")
        return X[i % 190], i % 3


def test_rows_that_cannot_be_read_are_no_duplicates() -> None:
    broken = project(train=Broken(0, 7, 8, 192, n=194), test=Broken(1, n=3))
    assert repeated_inputs(broken, "train") == (
        "190 of 194 inputs read: 2 the same as an earlier one; such as rows 1 and 191; "
        "2 of 3 of split 'test' are among them, row 0 first"
    )


def test_another_split_that_cannot_be_read_is_left_to_who_featurizes_it() -> None:
    assert repeated_inputs(project(train=X, test=Broken(0, 1, 2)), "train") == "all 200 inputs: no two the same"


def test_check_says_it() -> None:
    said = {check.name: check.detail for check in checks(project(train=torch.cat([X, X[:2]])), proj_dim=16)}
    assert said["inputs"].startswith("all 202 inputs: 2 the same as an earlier one")
    assert module.SECONDS < 5
