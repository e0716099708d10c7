"""The growing head: one block per task, the largest output of a class counts."""

import pytest
import torch
from tests.tiny import noise

from lamina.learner.head import Head, Output, class_scores


def test_blocks_are_appended_and_found_again():
    head = Head(4)
    first, second = head.add("a", [3, 1]), head.add("b", [1, 0, 2])
    assert head.outputs == [Output("a", 3), Output("a", 1), Output("b", 1), Output("b", 0), Output("b", 2)]
    assert head.block("a") is first
    assert head.block("b") is second
    features_bd = noise((6, 4), "features")
    scores_bj = head(features_bd)
    assert torch.equal(scores_bj, torch.cat([first(features_bd), second(features_bd)], 1))
    with pytest.raises(ValueError, match="task 'a' has a block in the head already"):
        head.add("a", [5])
    assert len(head.outputs) == 5


def test_older_blocks_keep_their_bits_when_one_is_added():
    head = Head(4)
    before = {name: value.clone() for name, value in head.add("a", [0, 1]).named_parameters()}
    head.add("b", [2])
    assert all(torch.equal(value, before[name]) for name, value in head.block("a").named_parameters())


def test_a_block_is_drawn_from_the_global_generator():
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(Head(4).add("a", [0, 1]).weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].abs().max() <= 0.5, "PyTorch's default: uniform in +-1/sqrt(width)"


def test_freezing_applies_to_all_blocks_so_far():
    head = Head(4)
    head.add("a", [0])
    head.freeze()
    head.add("b", [1])
    assert [p.requires_grad for p in head.parameters()] == [False, False, True, True]


def test_the_score_of_a_class_is_its_largest_output():
    outputs = [Output("a", 7), Output("a", 2), Output("b", 7), Output("b", 4), Output("c", 7)]
    scores_bj = torch.tensor([[1.0, 2.0, 3.0, -4.0, 2.5], [-1.0, -2.0, -3.0, -4.0, -5.0]])
    found_bc = class_scores(scores_bj, outputs, [2, 4, 7, 9])
    assert found_bc.tolist() == [[2.0, -4.0, 3.0, -torch.inf], [-2.0, -4.0, -1.0, -torch.inf]]
    assert class_scores(scores_bj.double(), outputs, [7, 2, 4]).dtype == torch.float64
