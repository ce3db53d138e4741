"""Pure functions: tensors and callables in, new tensors or frozen results out.

Axis letters everywhere: k inputs of the probe, c outputs per input, m = k * c rows of the behavioral gradients,
N parameters, d features of an activation, r columns of a sketch.
"""

from lightning_basin.functional.activations import activation_rank
from lightning_basin.functional.bracket import NullSpace, null_space_bracket
from lightning_basin.functional.certificates import certified_rank
from lightning_basin.functional.duplicate_stream import DuplicateSearch
from lightning_basin.functional.duplicates import dead_units, duplicate_classes, duplicated_activations
from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.hessian import hessian_matrix, hessian_product
from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows, weighted_rows
from lightning_basin.functional.lanczos import NormBound, NormIteration, next_bounds
from lightning_basin.functional.manifold import null_directions, surviving_fraction
from lightning_basin.functional.null_space import hessian_null_space, hessian_nullity
from lightning_basin.functional.output_curvature import OutputCurvature, output_curvature
from lightning_basin.functional.rank import (
    RANK_TOLERANCES,
    GradientRank,
    Spectrum,
    count_by_magnitude,
    default_rtol,
    effective_rank,
    gradient_rank,
    log_det_gram,
    numerical_rank,
    rank_gap,
    singular_values,
)
from lightning_basin.functional.rank_bound import gradient_rank_bound, merged_directions, merged_linear_directions
from lightning_basin.functional.softmax import softmax_jacobian
from lightning_basin.functional.spectrum import SpectrumAccumulator, behavioral_gradient_rank, sketched_spectrum

__all__ = [
    "RANK_TOLERANCES",
    "DenseGradients",
    "DuplicateSearch",
    "GradientRank",
    "KhatriRaoGradients",
    "NormBound",
    "NormIteration",
    "NullSpace",
    "OutputCurvature",
    "Spectrum",
    "SpectrumAccumulator",
    "activation_rank",
    "behavioral_gradient_rank",
    "behavioral_gradients",
    "certified_rank",
    "count_by_magnitude",
    "dead_units",
    "default_rtol",
    "duplicate_classes",
    "duplicated_activations",
    "effective_rank",
    "gradient_rank",
    "gradient_rank_bound",
    "gradient_rows",
    "hessian_matrix",
    "hessian_null_space",
    "hessian_nullity",
    "hessian_product",
    "log_det_gram",
    "merged_directions",
    "merged_linear_directions",
    "next_bounds",
    "null_directions",
    "null_space_bracket",
    "numerical_rank",
    "output_curvature",
    "rank_gap",
    "singular_values",
    "sketched_spectrum",
    "softmax_jacobian",
    "surviving_fraction",
    "weighted_rows",
]
