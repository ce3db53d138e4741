from collections import Counter

import pytest

from examples.claims.circuits import check, circuit_sizes, classes, describe, draw, formula_sizes, run


def test_sizes_of_known_functions():
    circuits, formulas = circuit_sizes(), formula_sizes()
    # Bits are rows 000, 001, ..., 111. Parity of three takes two exclusive ors, and a formula of ten inputs.
    parity, majority = 0b10010110, 0b11101000
    assert (circuits[parity], formulas[parity]) == (2, 10)
    # Majority is ab or c(a or b): five inputs; four gates (Knuth, The Art of Computer Programming, section 7.1.2).
    assert (circuits[majority], formulas[majority]) == (4, 5)
    assert len(classes()) == 14
    # Two constants, three variables and their negations take no gate.
    assert Counter(circuits.values())[0] == 8


@pytest.mark.slow
def test_rank_goes_with_merges_and_not_with_complexity():
    result = run(seeds=range(30), steps=2000)
    check(result)
    assert len(result.tasks) == 13
    assert "truth table" in describe(result)
    assert draw(result).axes
