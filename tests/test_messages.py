import pytest
import torch
from torch import nn

from lightning_basin.messages import packed, unpacked

NUMBERS = torch.arange(24.0).view(2, 3, 4)


@pytest.mark.parametrize(
    "tensor",
    [
        NUMBERS,
        NUMBERS.double(),
        NUMBERS.bfloat16(),
        NUMBERS.to(torch.complex128),
        NUMBERS > 3,
        NUMBERS.long(),
        NUMBERS.mT,
        NUMBERS[:, :0],
        torch.tensor(3.0),
    ],
    ids=lambda tensor: f"{tensor.dtype}, {tuple(tensor.shape)}",
)
def test_tensors_arrive_as_they_are_between_others(tensor):
    before, found, after = unpacked(packed((torch.ones(3), tensor, torch.zeros(1))))
    assert torch.equal(before, torch.ones(3))
    torch.testing.assert_close(found, tensor, rtol=0, atol=0)
    assert torch.equal(after, torch.zeros(1))


def test_parameters_arrive_as_plain_tensors_without_a_graph():
    layer = nn.Linear(2, 2)
    weight, result = unpacked(packed((layer.weight, layer(torch.ones(1, 2)))))
    assert not weight.requires_grad
    assert not result.requires_grad
    assert torch.equal(weight, layer.weight)


def test_what_arrives_can_be_written_to_and_shares_nothing_with_what_was_sent():
    sent = torch.zeros(3)
    unpacked(packed({"tensor": sent}))["tensor"].fill_(1.0)
    assert torch.equal(sent, torch.zeros(3))


def test_what_cannot_be_pickled_is_refused_before_anything_is_sent():
    with pytest.raises(Exception, match="pickle"):
        packed(lambda: None)
