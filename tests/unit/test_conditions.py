"""Conditions: named parts, dropping them, and the spec that they are checked against."""

from __future__ import annotations

import json

import pytest
import torch

from vistok.conditions import PARTS
from vistok.types import Condition, ConditionSpec, FeatureSpec, IdSpec, as_dataclass, to_json

SPEC = ConditionSpec(num_classes=4, ids=IdSpec(9, 3), features=FeatureSpec(2, 5), given=IdSpec(16, 2))


def everything(rows: int = 3) -> Condition:
    return Condition.together(
        Condition.from_labels(torch.arange(rows)),
        Condition.from_ids(torch.arange(rows)[:, None].expand(-1, 3), torch.arange(3).expand(rows, -1) > 0),
        Condition.from_features(torch.ones(rows, 5, 2)),
        Condition.from_given(torch.zeros(rows, 2, dtype=torch.int64)),
    )


def test_all_parts_ride_together():
    condition = SPEC.check(everything())
    assert tuple(condition.parts) == SPEC.parts == PARTS
    assert condition.labels.tolist() == [0, 1, 2]
    assert condition.given.shape == (3, 2)


def test_named_parts_are_dropped_alone():
    condition = everything().without(["ids"]).without(["features"], torch.tensor([True, False, False]))
    assert condition.dropped_of("ids").all()
    assert condition.dropped_of("features").tolist() == [True, False, False]
    assert not condition.dropped_of("labels").any()
    assert not condition.dropped.any()  # a row is unconditional when nothing is left of it
    assert condition.null().dropped.all()
    assert not everything().dropped_of("ids").any()


def test_a_part_that_is_absent_is_dropped():
    condition = Condition.from_labels([1, -1])
    assert condition.dropped_of("features").all()
    assert condition.without(["features"]).labels.tolist() == [1, -1]
    assert Condition.none(2).dropped.all()


def test_rows_of_guidance():
    condition = everything(2)
    rows = Condition.cat([condition.without(parts) for parts in ((), ("ids",), ("ids", "features"))])
    assert len(rows) == 6
    assert rows.dropped_of("ids").tolist() == [False, False, True, True, True, True]
    assert rows.dropped_of("features").tolist() == [False] * 4 + [True] * 2
    assert torch.equal(rows.part("ids").mask, condition.part("ids").mask.repeat(3, 1))


def test_rows_without_a_mask_are_valid_everywhere():
    masked = Condition.from_features(torch.ones(1, 2, 3), torch.tensor([[False, True]]))
    both = Condition.cat([masked, Condition.from_features(torch.ones(2, 2, 3))])
    assert both.mask.tolist() == [[False, True], [True, True], [True, True]]


def test_rows_are_chosen_in_any_way():
    condition = everything()
    for rows in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True])):
        assert condition[rows].labels.tolist() == [1, 2]
        assert len(Condition.none(3)[rows]) == len(condition[rows]) == 2


@pytest.mark.parametrize(
    ("spec", "condition", "message"),
    [
        (ConditionSpec(), Condition.from_labels([0]), "this generator takes no class labels; generate uncond"),
        (ConditionSpec(4), everything(), "takes class labels, not condition ids"),
        (SPEC, Condition.from_labels([4]), "class label 4 is out of range: this generator knows classes 0..3"),
        (SPEC, Condition.from_ids(torch.tensor([[0, 9, 0]])), "condition id 9 is out of range"),
        (SPEC, Condition.from_ids(torch.zeros(1, 4, dtype=torch.int64)), r"must be \(B, 3\), padded on the left"),
        (SPEC, Condition.from_features(torch.zeros(1, 5, 3)), r"must be \(B, 5, 2\)"),
        (SPEC, Condition.from_given(torch.tensor([[0, -1]])), "id of a given token -1 is out of range"),
        (SPEC, Condition.from_given(torch.zeros(1, 2, 3)), r"given tokens must be \(B, 2\)"),
    ],
)
def test_what_does_not_fit_the_spec_is_refused(spec, condition, message):
    with pytest.raises(ValueError, match=message):
        spec.check(condition)


def test_values_of_dropped_rows_do_not_matter():
    assert SPEC.check(Condition.from_labels([-1, 99]).drop(torch.tensor([False, True])))


@pytest.mark.parametrize("spec", [SPEC, ConditionSpec(), ConditionSpec(given=FeatureSpec(8, 4))])
def test_a_spec_is_the_same_after_json(spec):
    assert as_dataclass(ConditionSpec, json.loads(json.dumps(to_json(spec)))) == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Condition.from_labels([0]).without(["text"]), "'text' is no part of a condition"),
        (lambda: Condition.together(Condition.from_labels([0]), Condition.from_labels([1])), "different parts"),
        (lambda: Condition.together(Condition.from_labels([0]), Condition.from_ids(torch.ones(2, 1).long())), "1 rows"),
        (lambda: Condition.cat([Condition.from_labels([0]), Condition.none(1)]), "the same parts"),
    ],
)
def test_conditions_that_do_not_go_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
