import pickle

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torchmetrics import MetricCollection

from lightning_basin.functional.duplicates import duplicated_activations
from lightning_basin.functional.null_space import hessian_nullity
from lightning_basin.functional.spectrum import behavioral_gradient_rank
from lightning_basin.metrics import BehavioralGradientRank, DuplicatedActivations, HessianNullity


def matrix(num_rows: int, num_columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    """A matrix of small integers of the given rank: unit rows, and integer combinations of them."""
    mixing = torch.randint(-3, 4, (num_rows, rank), generator=torch.Generator().manual_seed(seed))
    mixing[:rank] = torch.eye(rank)
    return (mixing @ torch.eye(rank, num_columns, dtype=mixing.dtype)).to(torch.float64)


GRADIENTS = matrix(12, 7, rank=5)
HESSIAN = torch.diag(torch.tensor([3.0, 2.0, 0.0, 1.0, 0.0], dtype=torch.float64))
ACTIVATIONS = torch.tensor([[0, 1], [2, 1], [0, 1], [2, 1], [0, 1], [5, 5]], dtype=torch.float64)

CASES = [
    pytest.param(lambda **k: BehavioralGradientRank(7, **k), GRADIENTS, 5, behavioral_gradient_rank, id="rank"),
    pytest.param(lambda **k: HessianNullity(5, **k), HESSIAN, 2, hessian_nullity, id="nullity"),
    pytest.param(lambda **k: DuplicatedActivations(2, **k), ACTIVATIONS, 3, duplicated_activations, id="duplicates"),
]
every_metric = pytest.mark.parametrize(("make_metric", "data", "expected", "function"), CASES)


@every_metric
def test_value_is_the_known_number(make_metric, data, expected, function):
    metric = make_metric()
    metric.update(data)
    value = metric.compute()
    assert (value.shape, value.dtype, value.item()) == ((), torch.int64, expected)


@every_metric
def test_value_equals_the_functional_twin(make_metric, data, expected, function):
    metric = make_metric()
    metric.update(data)
    assert metric.compute() == function(data) == expected


@every_metric
def test_update_does_not_write_to_or_keep_the_callers_tensor(make_metric, data, expected, function):
    metric, given = make_metric(), data.clone()
    metric.update(given)
    torch.testing.assert_close(given, data, rtol=0, atol=0)
    given.copy_(torch.eye(*given.shape))
    assert metric.compute() == expected


@every_metric
def test_reset_forgets_everything(make_metric, data, expected, function):
    metric = make_metric()
    metric.update(torch.rand(data.shape, generator=torch.Generator().manual_seed(0)))
    metric.compute()
    metric.reset()
    metric.update(data)
    assert metric.compute() == expected


@every_metric
def test_forward_returns_the_value_of_the_batch_and_accumulates(make_metric, data, expected, function):
    metric = make_metric()
    other = torch.eye(*data.shape)
    assert metric(other) == function(other)
    assert metric(data) == expected
    both = make_metric()
    both.update(other)
    both.update(data)
    assert metric.compute() == both.compute()


@every_metric
def test_compute_twice_gives_the_same(make_metric, data, expected, function):
    metric = make_metric()
    metric.update(data)
    assert metric.compute() == metric.compute() == expected


@every_metric
@pytest.mark.parametrize(
    "copied",
    [lambda metric: pickle.loads(pickle.dumps(metric)), lambda metric: metric.clone()],
    ids=["pickle", "clone"],
)
def test_copy_goes_on_from_the_same_state_alone(make_metric, data, expected, function, copied):
    metric = make_metric()
    metric.update(data)
    copy = copied(metric)
    assert copy.compute() == expected
    copy.update(torch.eye(*data.shape))
    metric.reset()
    metric.update(data)
    assert metric.compute() == expected


@every_metric
def test_value_is_plotted(make_metric, data, expected, function):
    metric = make_metric()
    metric.update(data)
    figure, axes = metric.plot()
    assert isinstance(figure, Figure)
    _, same_axes = metric.plot([metric.compute(), metric.compute()], ax=axes)
    assert same_axes is axes
    plt.close(figure)


@every_metric
def test_metric_works_in_a_collection(make_metric, data, expected, function):
    collection = MetricCollection({"value": make_metric()})
    collection.update(data)
    assert collection.compute()["value"] == expected


@every_metric
def test_state_is_kept_in_float64(make_metric, data, expected, function):
    metric = make_metric()
    metric.update(data.to(torch.float32))
    tensors = [
        tensor
        for state in metric.metric_state.values()
        for tensor in (state if isinstance(state, list) else [state])
        if tensor.is_floating_point()
    ]
    assert [tensor.dtype for tensor in tensors] == [torch.float64]
    assert metric.compute() == expected


@every_metric
@pytest.mark.parametrize(
    "change", [lambda t: t[:, :-1], lambda t: t[0], lambda t: t[None]], ids=["columns", "1d", "3d"]
)
def test_wrong_shape_raises(make_metric, data, expected, function, change):
    metric = make_metric()
    with pytest.raises(ValueError, match=r"must be a matrix with \d columns, got shape"):
        metric.update(change(data))
    metric.update(data)
    assert metric.compute() == expected


def test_hessian_that_is_not_square_raises():
    with pytest.raises(ValueError, match="hessian must be square"):
        HessianNullity(5).update(HESSIAN[:3])


@pytest.mark.parametrize(
    ("make_metric", "message"),
    [
        (lambda: BehavioralGradientRank(0), "num_parameters must be at least 1, got 0"),
        (lambda: BehavioralGradientRank(3, rtol=2.0), "rtol must be .* inside"),
        (lambda: HessianNullity(-1), "num_parameters must be at least 1, got -1"),
        (lambda: HessianNullity(3, rtol=0.0), "rtol must be .* inside"),
        (lambda: DuplicatedActivations(0), "num_features must be at least 1, got 0"),
        (lambda: DuplicatedActivations(3, rtol=1.0), "rtol must be inside"),
        (lambda: HessianNullity(5).update(HESSIAN, num_inputs=0), "num_inputs must be at least 1, got 0"),
    ],
)
def test_value_out_of_range_raises(make_metric, message):
    with pytest.raises(ValueError, match=message):
        make_metric()


def test_rank_over_batches_is_that_of_all_rows():
    metric = BehavioralGradientRank(7)
    for rows in GRADIENTS.split([1, 4, 7]):
        metric.update(rows)
    assert metric.compute() == 5


def test_duplicates_are_found_across_batches():
    metric = DuplicatedActivations(2)
    for row in ACTIVATIONS.split(1):
        metric.update(row)
    assert metric.compute() == 3


def test_unequal_batches_weigh_by_their_inputs():
    # 3 A + 1 B has a zero entry only with these weights: A = diag(1, 1), B = diag(-3, 1).
    metric = HessianNullity(2)
    metric.update(torch.eye(2), num_inputs=3)
    metric.update(torch.diag(torch.tensor([-3.0, 1.0])), num_inputs=1)
    assert metric.compute() == 1


def test_rtol_decides():
    rows = torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    values = []
    for rtol in (1e-4, 1e-2):
        metric = BehavioralGradientRank(2, rtol=rtol)
        metric.update(rows)
        values.append(metric.compute().item())
    assert values == [2, 1]


@pytest.mark.parametrize(("rtol", "expected"), [(0.0, 0), (1e-6, 1)])
def test_nearly_equal_activations_are_duplicates_within_rtol_only(rtol, expected):
    metric = DuplicatedActivations(1, rtol=rtol)
    metric.update(torch.tensor([[1.0], [1.0 + 1e-9]], dtype=torch.float64))
    assert metric.compute() == expected


@pytest.mark.parametrize("make_metric", [lambda: BehavioralGradientRank(3), lambda: DuplicatedActivations(3)])
def test_without_rows_the_value_is_zero(make_metric):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert make_metric().compute() == 0


def test_empty_batch_adds_nothing():
    metric = BehavioralGradientRank(7)
    metric.update(GRADIENTS[:0])
    metric.update(GRADIENTS)
    assert metric.compute() == 5


@every_metric
def test_state_of_another_metric_can_be_merged(make_metric, data, expected, function):
    one, two = make_metric(), make_metric()
    one.update(data)
    two.update(torch.eye(*data.shape))
    both = make_metric()
    both.update(data)
    both.update(torch.eye(*data.shape))
    one.merge_state(two)
    assert one.compute() == both.compute()
