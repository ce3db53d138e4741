import dataclasses

from lightning_basin import BasinRecord, LayerRecord

TOLERANCES = (1e-12, 1e-8, 1e-6, 1e-4, 1e-2)


def layer_record(**changes):
    """A layer of which only the gradients were measured."""
    values = {
        "num_parameters": 12,
        "num_rows": 8,
        "gradient_rank": 5,
        "gradient_rank_gap": 7.5,
        "gradient_rank_at": dict(zip(TOLERANCES, (6, 5, 4, 3, 2), strict=True)),
        "gradient_effective_rank": 2.25,
        "gradient_rtol": 1e-14,
        "gradient_method": "svd",
    }
    return LayerRecord(**values | changes)


WHOLE = {
    "hessian_nullity": 7,
    "hessian_nullity_lower": 6,
    "hessian_nullity_upper": 8,
    "hessian_nullity_strict": 3,
    "hessian_negative": 1,
    "hessian_largest": 2.5,
    "residual_curvature": 0.125,
    "smallest_curvature": 0.25,
    "gauss_newton_nullity": 6,
    "duplicated_activations": 4,
    "duplicated_activations_exact": 2,
    "dead_units": 9,
}


SPECTRUM = {"gradient_largest": 4.5, "gradient_spectrum": {2: 1, -11: 4}}

HOW = {"hessian_resolving_loss": 3e-4, "hessian_rtol": 1e-14, "hessian_method": "dense"}


def basin_record(layers=None, **changes):
    values = dataclasses.asdict(layer_record()) | {"num_inputs": 8}
    return BasinRecord(**values | {"layers": layers or {}} | changes)


def whole_record():
    layers = {
        "fc1": layer_record(**WHOLE, **HOW, **SPECTRUM),
        "fc2": layer_record(gradient_rank=1),
        "": layer_record(gradient_rank=0),
    }
    return basin_record(
        layers,
        **WHOLE,
        **HOW,
        **SPECTRUM,
        loss=0.01,
        gradient_rank_bound=10,
        output_duplicated_activations=3,
        output_duplicated_activations_exact=1,
        notes=("a note",),
        measure_seconds=0.5,
        seconds={"trace": 0.125, "hessian": 0.375},
        step=40,
    )


NAMINGS = {
    "transformer": lambda n: [f"layers.{i // 2}.{('norm', 'linear')[i % 2]}" for i in range(n)],
    "flat": lambda n: [f"fc_{i}" for i in range(n)],
    "sequential": lambda n: [str(i) for i in range(n)],
    "two towers": lambda n: [f"{('left', 'right')[2 * i >= n]}.{i}.linear" for i in range(n)],
    "root and stem first": lambda n: ["", "stem", *(f"blocks.{i}.fc" for i in range(n - 3)), "head"],
    "root and names without numbers": lambda n: ["", *(f"encoder.layer_{i}.fc" for i in range(n - 1))],
    "nested numbers": lambda n: [f"stages.{i // 8}.blocks.{i % 8}.conv" for i in range(n)],
}
