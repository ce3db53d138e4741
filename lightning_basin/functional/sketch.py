"""Names of earlier versions, for scripts that import them: use `lightning_basin.functional`."""

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import LayerGradients, StackedGradients, gram_of
from lightning_basin.functional.spectrum import SpectrumAccumulator, sketched_spectrum

__all__ = [
    "DenseGradients",
    "KhatriRaoGradients",
    "LayerGradients",
    "SpectrumAccumulator",
    "StackedGradients",
    "gram_of",
    "sketched_spectrum",
]
