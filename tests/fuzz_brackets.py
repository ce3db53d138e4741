"""Random small networks and losses: what is said of their Hessians against all eigenvalues in 80 digits or more.

``check_bracket(seed)`` builds one network, measures it, and differentiates the same function by formulas on paper in
`mpmath` numbers.
"""

import random
from dataclasses import dataclass

import mpmath
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import measure_basin

EPSILON = 2.0**-52
BY_ROUNDING = 100.0  # factor around a threshold within which an eigenvalue is counted either way in float64
LEAST_PARAMETERS = 10
BY_ROOT = 1e4  # the same for eigenvalues of P, which are squares of what is counted
_number = np.frompyfunc(mpmath.mpf, 1, 1)
_exp = np.frompyfunc(mpmath.exp, 1, 1)
_tanh = np.frompyfunc(mpmath.tanh, 1, 1)
_log = np.frompyfunc(mpmath.log, 1, 1)
_normal_share = np.frompyfunc(mpmath.ncdf, 1, 1)


def numbers(tensor):
    return _number(np.array(tensor.detach().tolist(), dtype=object))


def _sigmoid(x):
    return 1 / (1 + _exp(-x))


# Each with its derivative by the input.
ACTIVATIONS = {
    nn.Tanh: lambda x: (_tanh(x), 1 - _tanh(x) ** 2),
    nn.Softplus: lambda x: (_log(1 + _exp(x)), _sigmoid(x)),
    nn.ReLU: lambda x: (np.where(x > 0, x, 0 * x), np.where(x > 0, 1 + 0 * x, 0 * x)),
    nn.GELU: lambda x: (x * _normal_share(x), _normal_share(x) + x * _exp(-(x**2) / 2) / mpmath.sqrt(2 * mpmath.pi)),
}


# --- losses, as functions of what the last layer returns -------------------------------------------------------------


@dataclass
class Softmax:
    """Cross-entropies of some columns, one per input: s (log sum exp z - t z)."""

    columns: list
    scales: object  # Shape (k,).
    targets: object  # Shape (k, s).

    def derivatives(self, z):
        p = _exp(z[:, self.columns])
        p = p / p.sum(1)[:, None]
        s = self.scales[:, None]
        second = -s[:, :, None] * p[:, :, None] * p[:, None, :]
        for i in range(len(self.columns)):
            second[:, i, i] = second[:, i, i] + s[:, 0] * p[:, i]
        return s * (p - self.targets), second


@dataclass
class Logistic:
    """Binary cross-entropies of single columns: s (softplus(z) - t z)."""

    columns: list
    scales: object  # Shape (k, s).
    targets: object

    def derivatives(self, z):
        p = _sigmoid(z[:, self.columns])
        return self.scales * (p - self.targets), _diagonal(self.scales * p * (1 - p))


@dataclass
class Huber:
    """s h(z - t), with the square halved up to delta."""

    columns: list
    scale: object
    targets: object
    delta: object = mpmath.inf

    def derivatives(self, z):
        off = 0 * z[:, self.columns] if self.targets is None else z[:, self.columns] - self.targets
        near = abs(off) <= self.delta
        slope = np.where(near, off, np.where(off > 0, 1, -1) * (0 if self.delta == mpmath.inf else self.delta))
        return self.scale * slope, _diagonal(self.scale * np.where(near, 1 + 0 * off, 0 * off))


def _diagonal(values):
    blocks = _number(np.zeros((*values.shape, values.shape[1]), dtype=object))
    for i in range(values.shape[1]):
        blocks[:, i, i] = values[:, i]
    return blocks


# --- networks --------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    body: nn.Sequential
    inputs: torch.Tensor
    link: nn.Module
    loss_fn: object
    terms: list
    name: str


class Link(nn.Module):
    """What follows the last layer; without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


def drawn_body(draw):
    activation = draw.choice(list(ACTIVATIONS))
    d_in, hidden = draw.randint(1, 3), draw.randint(1, 4)
    d_out = draw.choice([1, 2, 3, 4])
    layers = [nn.Linear(d_in, hidden), activation()]
    if draw.random() < 0.25:
        layers += [nn.Linear(hidden, 2), activation()]
        hidden = 2
    layers.append(nn.Linear(hidden, d_out))
    body, inputs = nn.Sequential(*layers).double(), torch.randn(draw.randint(2, 5), d_in, dtype=torch.float64)
    if draw.random() < 0.3:
        inputs[len(inputs) // 2 :] = inputs[: len(inputs) - len(inputs) // 2].clone()  # Repeated inputs.
    scale = draw.choice([1.0, 1.0, 3.0, 10.0, 30.0, 60.0, 150.0])
    with torch.no_grad():
        body[-1].weight.mul_(scale)
        body[-1].bias.mul_(scale)
    return body, inputs


def drawn_case(draw):
    body, inputs = drawn_body(draw)
    z = body(inputs).detach()
    k, c = z.shape
    kinds = [squares, huber, binary, binary_of_probabilities]
    kinds += [classes, classes, smooth, heads_and_squares] if c > 1 else []
    kinds += [positions] if c == 4 else []
    return draw.choice(kinds)(draw, body, inputs, z, k, c)


def squares(draw, body, inputs, z, k, c):
    targets = z if (is_exact := draw.random() < 0.2) else z + 10 ** draw.uniform(-13, 0) * torch.randn_like(z)
    # A perfect fit in float64 is taken for one.
    term = Huber(list(range(c)), mpmath.mpf(2) / (k * c), None if is_exact else numbers(targets))
    return Case(body, inputs, nn.Identity(), lambda f, _: F.mse_loss(f, targets), [term], "squares")


def huber(draw, body, inputs, z, k, c):
    targets, delta = z + torch.randn_like(z) * 10 ** draw.uniform(-4, 1), 0.5
    term = Huber(list(range(c)), mpmath.mpf(1) / (k * c), numbers(targets), mpmath.mpf(delta))
    return Case(body, inputs, nn.Identity(), lambda f, _: F.huber_loss(f, targets, delta=delta), [term], "huber")


def binary(draw, body, inputs, z, k, c):
    labels = drawn_binary_labels(draw, z)
    weight = torch.rand(c, dtype=torch.float64) + 0.5
    scales = numbers(torch.where(labels == 1, weight, 1.0)) / (k * c)
    term = Logistic(list(range(c)), scales, numbers(labels))

    def loss_fn(f, _):
        return F.binary_cross_entropy_with_logits(f, labels, pos_weight=weight)

    return Case(body, inputs, nn.Identity(), loss_fn, [term], "binary")


def binary_of_probabilities(draw, body, inputs, z, k, c):
    labels = drawn_binary_labels(draw, z)
    term = Logistic(list(range(c)), _number(np.ones((k, c), dtype=object)), numbers(labels))

    def by_hand(f, _):
        return -(labels * f.log() + (1 - labels) * (1 - f).log()).sum()

    def by_torch(f, _):
        return F.binary_cross_entropy(f, labels, reduction="sum")

    # What torch takes for the derivative of its own is another one where p (1 - p) < 1e-12.
    is_defined = float(z.abs().max()) < 25
    loss_fn = draw.choice([by_hand, by_torch]) if is_defined else by_hand
    return Case(body, inputs, nn.Sigmoid(), loss_fn, [term], "binary of probabilities")


def drawn_binary_labels(draw, z):
    return (z > 0).double() if draw.random() < 0.6 else (torch.rand_like(z) < 0.5).double()


def classes(draw, body, inputs, z, k, c):
    labels = z.argmax(1) if draw.random() < 0.6 else torch.randint(0, c, (k,))
    weight = torch.rand(c, dtype=torch.float64) + 0.5
    term = Softmax(list(range(c)), numbers(weight[labels]), numbers(F.one_hot(labels, c).double()))
    ways = {
        "logits": (nn.Identity(), lambda f, _: F.cross_entropy(f, labels, weight=weight, reduction="sum")),
        "log-probabilities": (nn.LogSoftmax(1), lambda f, _: F.nll_loss(f, labels, weight=weight, reduction="sum")),
        "logarithms": (
            Link(lambda z: z.softmax(1).log()),
            lambda f, _: F.nll_loss(f, labels, weight=weight, reduction="sum"),
        ),
        "probabilities": (nn.Softmax(1), lambda f, _: F.nll_loss(f.log(), labels, weight=weight, reduction="sum")),
    }
    name = draw.choice(list(ways))
    return Case(body, inputs, *ways[name], [term], f"classes by {name}")


def smooth(draw, body, inputs, z, k, c):
    targets = torch.softmax(torch.randn_like(z), 1)
    if draw.random() < 0.4:  # Nearly those that the network has.
        targets = (z + 10 ** draw.uniform(-8, -1) * torch.randn_like(z)).softmax(1)
    exact = numbers(targets)
    term = Softmax(list(range(c)), exact.sum(1), exact / exact.sum(1)[:, None])
    ways = {
        "logits": (nn.Identity(), lambda f, _: F.cross_entropy(f, targets, reduction="sum")),
        "divergence": (nn.LogSoftmax(1), lambda f, _: F.kl_div(f, targets, reduction="sum")),
    }
    name = draw.choice(list(ways))
    return Case(body, inputs, *ways[name], [term], f"soft labels by {name}")


def heads_and_squares(draw, body, inputs, z, k, c):
    """A softmax over the first outputs, squared errors of the others."""
    first = draw.randint(2, c)
    labels = torch.randint(0, first, (k,))
    targets = z[:, first:] + 1e-3 * torch.randn_like(z[:, first:])
    one_hot = numbers(F.one_hot(labels, first).double())
    terms = [Softmax(list(range(first)), _number(np.ones(k, dtype=object)), one_hot)]
    if first < c:
        terms.append(Huber(list(range(first, c)), mpmath.mpf(2), numbers(targets)))

    def loss_fn(f, _):
        error = (f[:, first:] - targets).square().sum()
        return F.nll_loss(f[:, :first].log_softmax(1), labels, reduction="sum") + error

    def separated(z):
        return torch.cat([z[:, :first].log_softmax(1), z[:, first:]], 1)

    link = draw.choice([nn.Identity(), Link(separated)])
    return Case(body, inputs, link, loss_fn, terms, "heads and squares")


def positions(draw, body, inputs, z, k, c):
    """Two classes at two positions, the classes first."""
    labels = torch.randint(0, 2, (k, 2))
    if draw.random() < 0.5:
        labels = z.view(k, 2, 2).argmax(1)
    ones = _number(np.ones(k, dtype=object))
    terms = [Softmax([p, 2 + p], ones / (2 * k), numbers(F.one_hot(labels[:, p], 2).double())) for p in range(2)]
    ways = {
        "logits": (Link(lambda z: z.view(-1, 2, 2)), lambda f, _: F.cross_entropy(f, labels)),
        "log-probabilities": (Link(lambda z: z.view(-1, 2, 2).log_softmax(1)), lambda f, _: F.nll_loss(f, labels)),
    }
    name = draw.choice(list(ways))
    return Case(body, inputs, *ways[name], terms, f"positions by {name}")


# --- the same on paper -----------------------------------------------------------------------------------------------


class Exact:
    """H, P and R = H - P of a case by the last layer's outputs, in the current precision of mpmath."""

    def __init__(self, case):
        self.case = case
        self.inputs = numbers(case.inputs)
        self.linears = [layer for layer in case.body if isinstance(layer, nn.Linear)]
        self.activation = next(ACTIVATIONS[type(layer)] for layer in case.body if type(layer) in ACTIVATIONS)
        self.theta = np.concatenate([numbers(p).reshape(-1) for p in case.body.parameters()])
        logits, rows = self.gradients(self.theta)
        slope, second = self.loss(logits)
        k, c = logits.shape
        rows = rows.reshape(k, c, -1)
        self.gauss_newton = sum(rows[x].T @ second[x] @ rows[x] for x in range(k))
        step = mpmath.mpf(10) ** -(mpmath.mp.dps // 3)
        columns = []
        for index in range(len(self.theta)):
            ends = []
            for sign in (1, -1):
                moved = self.theta.copy()
                moved[index] = moved[index] + sign * step
                # Of the linear part of the loss: its second derivative is R.
                ends.append(self.pulled(moved, slope))
            columns.append((ends[0] - ends[1]) / (2 * step))
        residual = np.stack(columns, 1)
        self.residual = (residual + residual.T) / 2
        self.hessian = self.gauss_newton + self.residual
        self.largest = max(map(abs, eigenvalues(self.hessian)))
        # Where labels are soft, p - t is a difference of numbers near one.
        self.rounding = EPSILON * (rows**2).sum() if "soft" in case.name else 0

    def layers(self, theta):
        at, found = 0, []
        for linear in self.linears:
            shape = tuple(linear.weight.shape)
            size = shape[0] * shape[1]
            found.append((theta[at : at + size].reshape(shape), theta[at + size : at + size + shape[0]]))
            at += size + shape[0]
        return found

    def passed(self, theta):
        """Logits, and of each layer what enters it and the derivative of the activation before it."""
        entering, steepness, hidden = [], [], self.inputs
        layers = self.layers(theta)
        for number, (weight, bias) in enumerate(layers):
            entering.append(hidden)
            hidden = hidden @ weight.T + bias
            if number < len(layers) - 1:
                hidden, derivative = self.activation(hidden)
                steepness.append(derivative)
        return hidden, entering, steepness

    def back(self, theta, entering, steepness, pull):
        """Gradients of each input's ``pull . logits``, shape (k, N)."""
        parts, layers = [], self.layers(theta)
        for number in reversed(range(len(layers))):
            products = pull[:, :, None] * entering[number][:, None, :]
            parts[:0] = [products.reshape(len(pull), -1), pull]
            if number:
                pull = (pull @ layers[number][0]) * steepness[number - 1]
        return np.concatenate(parts, 1)

    def gradients(self, theta):
        logits, *known = self.passed(theta)
        units = _number(np.eye(logits.shape[1], dtype=object))
        rows = [self.back(theta, *known, np.repeat(unit[None], len(logits), 0)) for unit in units]
        return logits, np.stack(rows, 1)

    def pulled(self, theta, slope):
        _, *known = self.passed(theta)
        return self.back(theta, *known, slope).sum(0)

    def loss(self, logits):
        slope = _number(np.zeros(logits.shape, dtype=object))
        second = _number(np.zeros((*logits.shape, logits.shape[1]), dtype=object))
        for term in self.case.terms:
            first, blocks = term.derivatives(logits)
            slope[:, term.columns] = slope[:, term.columns] + first
            for x in range(len(logits)):
                place = np.ix_(term.columns, term.columns)
                second[x][place] = second[x][place] + blocks[x]
        return slope, second


def eigenvalues(matrix):
    return list(mpmath.eigsy(mpmath.matrix(matrix.tolist()), eigvals_only=True))


def below(values, threshold):
    return sum(abs(value) <= threshold for value in values)


def check_part(record, exact, columns, where):
    """What a record says of the diagonal block of some parameters."""
    if record.hessian_method is None:
        return
    place = np.ix_(columns, columns)
    whole, curved, rest = (eigenvalues(m[place]) for m in (exact.hessian, exact.gauss_newton, exact.residual))
    largest, residual = max(map(abs, whole)), max(map(abs, rest))
    said = f"{where}: {record.hessian_method}, |R| {mpmath.nstr(residual, 3)}, largest {mpmath.nstr(largest, 3)}"
    # Where R = 0 all is read off P, of which rounding leaves what is below the square of that of its root.
    floor = (max(record.num_rows, len(columns)) * EPSILON) ** 2 * max(curved)
    is_exact = residual <= mpmath.mpf(10) ** -30 * largest
    limit = floor if is_exact else record.hessian_rtol * largest
    threshold = max(limit, residual)
    counts = {below(whole, threshold * (1 + sign * mpmath.mpf(10) ** -6)) for sign in (-1, 0, 1)}
    is_sharp = below(curved, floor * BY_ROOT) == below(curved, floor / BY_ROOT)
    if not is_sharp:
        return
    if record.hessian_nullity_lower is not None:
        lower, upper = record.hessian_nullity_lower, record.hessian_nullity_upper
        assert lower <= max(counts), f"{said}: at least {lower}, but truly {counts}"
        assert upper >= min(counts), f"{said}: at most {upper}, but truly {counts}"
    if record.hessian_nullity is not None and not record.hessian_certified:  # Counted in float64.
        counts.add(below(whole, max(threshold, BY_ROUNDING * len(columns) * EPSILON * exact.largest)))
        # Rounding of p - t moves R, and with it both the threshold and the eigenvalues.
        counts |= {below(whole, max(limit, residual + sign * 2 * exact.rounding)) for sign in (-1, 1)}
        counts = set(range(min(counts), max(counts) + 1))
    if record.hessian_nullity is not None:
        assert record.hessian_nullity in counts, f"{said}: nullity {record.hessian_nullity}, but truly {counts}"
    if record.gauss_newton_nullity is not None:
        expected = below(curved, floor)
        assert record.gauss_newton_nullity == expected, f"{said}: P {record.gauss_newton_nullity}, truly {expected}"
    # In small blocks N eps is less than the rounding of an entry.
    if record.hessian_nullity_strict is None or is_exact or len(columns) < LEAST_PARAMETERS:
        return
    strict = {below(whole, size) for size in (limit / BY_ROUNDING, max(limit, exact.rounding) * BY_ROUNDING)}
    if len(strict) == 1:
        negative = sum(value < -limit for value in whole)
        found, truly = (record.hessian_nullity_strict, record.hessian_negative), (strict.pop(), negative)
        assert found == truly, f"{said}: zero and negative {found}, but truly {truly}"


LOST = float(np.log(1e-9 / EPSILON))  # margin of logits at which gradients of probabilities have fewer than nine digits


def check_bracket(seed):
    """Compare what is measured of one random network with 80 digits or more.

    Returns:
        Whether there was something to compare.

    Raises:
        AssertionError: If something that is said is not so.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    case = drawn_case(draw)
    network = nn.Sequential(case.body, case.link)
    modes = [draw.choice(["auto", "dense"]), "bracket"]
    options = {"memory_budget": 2**26} if draw.random() < 0.2 else {}
    targets = torch.zeros(len(case.inputs))
    try:
        case.loss_fn(network(case.inputs), targets)
    except RuntimeError:  # Probabilities that have rounded to more than 1.
        return False
    if not case.loss_fn(network(case.inputs), targets).isfinite():
        return False
    largest = float(case.body(case.inputs).detach().abs().max())
    with mpmath.workdps(80 + int(1.5 * largest)), np.errstate(all="ignore"):
        exact = Exact(case)
        for mode in modes:
            try:
                record = measure_basin(network, case.inputs, targets, loss_fn=case.loss_fn, hessian=mode, **options)
            except RuntimeError as error:  # Gradients of probabilities that have lost their digits.
                if 2 * largest < LOST or "saturated softmax" not in str(error):
                    raise
                return False
            where = f"seed {seed}, {case.name}, {mode}, logits up to {largest:.0f}"
            check_part(record, exact, list(range(len(exact.theta))), where)
            at = 0
            for name, layer in record.layers.items():
                check_part(layer, exact, list(range(at, at + layer.num_parameters)), f"{where}, layer {name}")
                at += layer.num_parameters
    return True
