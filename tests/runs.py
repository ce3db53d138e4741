"""A run written by hand: 4 measurements of 3 layers on 5 inputs, whose every value is known."""

from dataclasses import replace

from lightning_basin import MergedInput
from lightning_basin.history.page import DATA_ID, write_data
from lightning_basin.layer_names import layer_blocks
from tests.whole_records import HOW, WHOLE, basin_record, layer_record

LAYERS = ("fc1", "fc2", "head")

RANKS = (8, 8, 5, 2)
LAYER_RANKS = {"fc1": (5, 5, 3, 0), "fc2": (4, 4, 2, 1), "head": (3, 3, 2, 1)}
LOSSES = (1.0, 1e-8, 1e-9, 1e-12)
STEPS = (0, 10, 20, 30)
ZERO_LOSS_STEP = 10
MERGED = (
    (),
    (),
    (MergedInput(2, 0, "head"),),
    (MergedInput(2, 0, "fc2"), MergedInput(4, 2, "head"), MergedInput(3, 1, None)),
)
DUPLICATES = {"fc1": (0, 0, 0, 0), "fc2": (0, 0, 0, 1), "head": (0, 0, 1, 2)}

SPECTRA = ({4: 2, 0: 6}, None, {4: 2, 0: 2, -44: 1}, {5: 1, 4: 1})
"""Of the network, by quarters of a decade; the second measurement has none."""


def records():
    """Rank 8 of 8 until after zero loss, then 5 and 2; the bracket closes at the end, on N - rank = 38."""
    made = []
    for i, step in enumerate(STEPS):
        layers = {
            name: layer_record(
                num_parameters=12,
                gradient_rank=LAYER_RANKS[name][i],
                duplicated_activations=DUPLICATES[name][i],
                gradient_spectrum={-2: LAYER_RANKS[name][i]} if LAYER_RANKS[name][i] else {},
                gradient_largest=0.5 if LAYER_RANKS[name][i] else 0.0,
            )
            for name in LAYERS
        }
        record = basin_record(
            layers,
            num_parameters=40,
            num_inputs=5,
            gradient_rank=RANKS[i],
            gradient_rank_bound=(8, 8, 6, 2)[i],
            gradient_rank_gap=(7.5, 7.5, 1.0, 9.0)[i],
            gradient_rank_at=dict(
                zip((1e-12, 1e-8, 1e-6, 1e-4, 1e-2), (8 - i, 7 - i, 6 - i, 5 - i, 4 - i), strict=True)
            ),
            gradient_spectrum=SPECTRA[i],
            gradient_largest=None if SPECTRA[i] is None else (12.0, 0.0, 15.0, 20.0)[i],
            hessian_nullity_lower=(30, 32, 35, 38)[i],
            hessian_nullity_upper=(40, 39, 38, 38)[i],
            hessian_nullity=(None, None, None, 38)[i],
            duplicated_activations=max(DUPLICATES["fc2"][i], DUPLICATES["head"][i]),
            loss=LOSSES[i],
            merged_inputs=MERGED[i],
            step=step,
        )
        made.append(record)
    return made


def deep_records(num_layers, num_records):
    """A run of many layers and blocks, of which all was measured; the loss reaches zero in its middle."""
    names = [f"layers.{i // 2}.{('norm', 'linear')[i % 2]}" for i in range(num_layers)]
    spectrum = {"gradient_spectrum": {b: 1 + b % 7 for b in range(-20, 8)}, "gradient_largest": 100.0}
    made = []
    for i in range(num_records):
        changes = WHOLE | HOW | spectrum | {"gradient_rank": i % 9, "activation_rank": 5, "activation_rank_gap": 8.0}
        record = basin_record(
            {name: layer_record(**changes) for name in names},
            **changes,
            blocks={block: layer_record(**changes) for block in layer_blocks(names)},
            gradient_rank_bound=8,
            output_duplicated_activations=3,
            output_duplicated_activations_exact=1,
            loss=1.0 if 2 * i < num_records else 1e-9,
            step=10 * i,
        )
        made.append(record)
    return made


def write_bare_page(path, history):
    """A report without figures, which take a second."""
    path.write_text(f'<script type="application/json" id="{DATA_ID}">{write_data(history)}</script>')


def without_layers():
    return [replace(record, layers={}, merged_inputs=()) for record in records()]
