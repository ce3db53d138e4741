"""Names of earlier versions, for scripts that import them: use `lightning_basin.functional`."""

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import LayerGradients, StackedGradients, gram_of, stacked
from lightning_basin.functional.spectrum import SpectrumAccumulator, gradient_spectrum, sketched_spectrum

__all__ = [
    "DenseGradients",
    "KhatriRaoGradients",
    "LayerGradients",
    "SpectrumAccumulator",
    "StackedGradients",
    "gradient_spectrum",
    "gram_of",
    "sketched_spectrum",
    "stacked",
]
