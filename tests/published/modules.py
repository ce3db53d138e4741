"""Modules as their packages publish them, with small data to fit them on. None of the packages need be installed."""

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

Fit = Callable[[list[Any]], nn.Module]
"""Trains a new module on the same data with some callbacks for a few steps, and returns it."""

Fits = dict[str, Fit]
"""A package's modules by name."""

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
    "num_sanity_val_steps": 0,
}


def trained(module: Any, batches: Any, callbacks: list[Any], package: str = "lightning.pytorch") -> nn.Module:
    trainer = import_module(package).Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
    trainer.fit(module, batches)
    return module


def waves(num: int = 80) -> np.ndarray:
    time = np.arange(num)
    return (np.sin(time / 3) + 0.1 * (7 * time % 5)).astype(np.float32)


def table(num_rows: int = 64) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_rows, 4)).astype(np.float32)


# ------------------------------------------------------------------------------------------ lightning's own modules


def lightning() -> Fits:
    boring = import_module("lightning.pytorch.demos.boring_classes")
    lstm = import_module("lightning.pytorch.demos.lstm")
    transformer = import_module("lightning.pytorch.demos.transformer")
    inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32))
    words = torch.from_numpy(np.random.default_rng(0).integers(6, size=(16, 3)))

    def on_vectors(name: str, callbacks: list[Any]) -> nn.Module:
        return trained(getattr(boring, name)(), DataLoader(inputs, 8), callbacks)

    def on_words(make: Callable[..., Any], callbacks: list[Any]) -> nn.Module:
        module = make(vocab_size=6)
        module.prepare_data = lambda: None  # It downloads a text that is not used here.
        return trained(module, DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), 8), callbacks)

    return {
        **{name: partial(on_vectors, name) for name in ("BoringModel", "ManualOptimBoringModel", "DemoModel")},
        "LightningTransformer": partial(on_words, transformer.LightningTransformer),
        "LightningLSTM": partial(on_words, lstm.LightningLSTM),
    }


# ------------------------------------------------------------------------------------------------------ time series


def neuralforecast() -> Fits:
    core, models, pandas = (import_module(name) for name in ("neuralforecast", "neuralforecast.models", "pandas"))
    frame = pandas.DataFrame(
        {"unique_id": "a", "ds": pandas.date_range("2020-01-01", periods=80, freq="D"), "y": waves()}
    )

    def fit(name: str, options: dict[str, Any], callbacks: list[Any]) -> nn.Module:
        model = getattr(models, name)(
            h=2,
            input_size=8,
            max_steps=3,
            batch_size=1,
            windows_batch_size=32,
            **{"scaler_type": "identity", "random_seed": 1, "callbacks": callbacks, **QUIET, **options},
        )
        forecast = core.NeuralForecast(models=[model], freq="D")
        forecast.fit(frame)
        return forecast.models[0]

    small: dict[str, dict[str, Any]] = {
        "MLP": {"hidden_size": 8},
        "NBEATS": {"mlp_units": 3 * [[8, 8]]},
        "NHITS": {"mlp_units": 3 * [[8, 8]]},
        "DLinear": {"moving_avg_window": 3},
        "NLinear": {},
        "LSTM": {"encoder_hidden_size": 4, "decoder_hidden_size": 4},
        "GRU": {"encoder_hidden_size": 4, "decoder_hidden_size": 4},
        "TCN": {"encoder_hidden_size": 4, "decoder_hidden_size": 4},
        "TiDE": {"hidden_size": 8, "decoder_output_dim": 4, "temporal_decoder_dim": 8},
        "TFT": {"hidden_size": 4, "n_head": 1},
        "PatchTST": {"hidden_size": 8, "n_heads": 2, "linear_hidden_size": 8, "encoder_layers": 1, "patch_len": 4},
    }
    return {name: partial(fit, name, options) for name, options in small.items()}


def darts() -> Fits:
    models, series = import_module("darts.models"), import_module("darts").TimeSeries
    values = series.from_values(waves())

    def fit(name: str, options: dict[str, Any], callbacks: list[Any]) -> nn.Module:
        kept = {key: value for key, value in QUIET.items() if key not in ("logger", "enable_checkpointing")}
        model = getattr(models, name)(
            input_chunk_length=8,
            n_epochs=2,
            batch_size=32,
            random_state=1,
            **{"pl_trainer_kwargs": {**kept, "callbacks": callbacks}, **options},
        )
        model.fit(values)
        return model.model

    blocks = {"output_chunk_length": 2, "num_stacks": 1, "num_blocks": 1, "num_layers": 1, "layer_widths": 8}
    small: dict[str, dict[str, Any]] = {
        "NBEATSModel": blocks,
        "NHiTSModel": blocks,
        "NLinearModel": {"output_chunk_length": 2},
        "DLinearModel": {"output_chunk_length": 2, "kernel_size": 3},
        "BlockRNNModel": {"output_chunk_length": 2, "hidden_dim": 4},
        "RNNModel": {"training_length": 10, "hidden_dim": 4},
        "TCNModel": {"output_chunk_length": 2, "num_filters": 2, "kernel_size": 2},
        "TiDEModel": {"output_chunk_length": 2, "hidden_size": 4, "temporal_decoder_hidden": 4},
        "TransformerModel": {"output_chunk_length": 2, "d_model": 4, "nhead": 1, "dim_feedforward": 4},
        "TSMixerModel": {"output_chunk_length": 2, "hidden_size": 4, "ff_size": 4, "num_blocks": 1},
    }
    return {name: partial(fit, name, options) for name, options in small.items()}


def pytorch_forecasting() -> Fits:
    forecasting, pandas = import_module("pytorch_forecasting"), import_module("pandas")
    frame = pandas.DataFrame(
        [{"series": name, "time": time, "value": float(value)} for name in "ab" for time, value in enumerate(waves(16))]
    )
    data = forecasting.TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=6,
        max_prediction_length=2,
        time_varying_unknown_reals=["value"],
    )

    def fit(name: str, options: dict[str, Any], callbacks: list[Any]) -> nn.Module:
        module = getattr(forecasting, name).from_dataset(data, **copy.deepcopy(options))
        return trained(module, data.to_dataloader(train=True, batch_size=8, num_workers=0), callbacks)

    small: dict[str, dict[str, Any]] = {
        "NBeats": {"loss": forecasting.SMAPE(), "widths": [4, 4], "num_blocks": [1, 1], "num_block_layers": [1, 1]},
        "TemporalFusionTransformer": {"hidden_size": 4, "hidden_continuous_size": 4, "attention_head_size": 1},
        "DeepAR": {"hidden_size": 4, "rnn_layers": 1},
    }
    return {name: partial(fit, name, options) for name, options in small.items()}


def gluonts() -> Fits:
    pandas = import_module("pandas")
    data = [{"start": pandas.Period("2020-01-01", "D"), "target": waves()}]

    def fit(path: str, options: dict[str, Any], callbacks: list[Any]) -> nn.Module:
        module, name = path.split(".")
        kept = {key: value for key, value in QUIET.items() if key not in ("logger", "enable_checkpointing")}
        witness = module_witness()
        estimator = getattr(import_module(f"gluonts.torch.model.{module}"), name)(
            **{"prediction_length": 2, "batch_size": 8, "num_batches_per_epoch": 3, **options},
            trainer_kwargs={**kept, "logger": False, "max_epochs": 2, "callbacks": [*callbacks, witness]},
        )
        estimator.train(data)
        return witness.module

    small: dict[str, dict[str, Any]] = {
        "simple_feedforward.SimpleFeedForwardEstimator": {"hidden_dimensions": [4]},
        "deepar.DeepAREstimator": {"freq": "D", "num_layers": 1, "hidden_size": 4},
        "d_linear.DLinearEstimator": {"context_length": 8, "hidden_dimension": 4},
        "patch_tst.PatchTSTEstimator": {"context_length": 8, "patch_len": 4, "d_model": 4, "nhead": 1},
    }
    return {path.partition(".")[2]: partial(fit, path, options) for path, options in small.items()}


def module_witness() -> Any:
    """A callback that keeps the module, where a package returns none."""

    class Witness(import_module("lightning.pytorch").Callback):
        def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
            self.module = pl_module

    return Witness()


# ------------------------------------------------------------------------------------------------- tables, equations


def deeptab() -> Fits:
    models, configs, pandas = (import_module(name) for name in ("deeptab.models", "deeptab.configs", "pandas"))
    frame = pandas.DataFrame(table(), columns=list("abcd"))
    target = frame.sum(axis=1).to_numpy()

    def fit(name: str, target: Any, callbacks: list[Any]) -> nn.Module:
        witness = module_witness()
        options = {"trainer_config": configs.TrainerConfig(max_epochs=2, batch_size=32)}
        model = getattr(models, name)(**options, random_state=1)
        model.fit(frame, target, callbacks=[*callbacks, witness], enable_progress_bar=False, accelerator="cpu")
        return witness.module

    targets = {"MLPRegressor": target, "ResNetClassifier": (target > 0).astype(int), "FTTransformerRegressor": target}
    return {name: partial(fit, name, target) for name, target in targets.items()}


def pytorch_tabular() -> Fits:
    package, pandas = import_module("pytorch_tabular"), import_module("pandas")
    configs, models = import_module("pytorch_tabular.config"), import_module("pytorch_tabular.models")
    frame = pandas.DataFrame(table(), columns=list("abcd"))
    frame["target"] = (frame.sum(axis=1) > 0).astype(int)

    def fit(config: Any, callbacks: list[Any]) -> nn.Module:
        model = package.TabularModel(
            data_config=configs.DataConfig(target=["target"], continuous_cols=list("abcd")),
            model_config=copy.deepcopy(config),
            optimizer_config=configs.OptimizerConfig(),
            trainer_config=configs.TrainerConfig(
                max_epochs=2,
                batch_size=32,
                accelerator="cpu",
                progress_bar="none",
                seed=1,
                checkpoints=None,
                load_best=False,
                early_stopping=None,
            ),
            verbose=False,
            suppress_lightning_logger=True,
        )
        model.fit(train=frame, callbacks=callbacks)
        return model.model

    task = "classification"
    small = {
        "CategoryEmbedding": models.CategoryEmbeddingModelConfig(task=task, layers="8-4"),
        "GANDALF": models.GANDALFConfig(task=task, gflu_stages=1),
        "AutoInt": models.AutoIntConfig(task=task, attn_embed_dim=4, num_heads=1, embedding_dim=4),
    }
    return {name: partial(fit, config) for name, config in small.items()}


def pina() -> Fits:
    package, solvers = import_module("pina"), import_module("pina.solver")
    problems, conditions = import_module("pina.problem"), import_module("pina.condition")
    networks, zoo = import_module("pina.model"), import_module("pina.problem.zoo")
    inputs = torch.from_numpy(table()[:, :2])
    label = package.LabelTensor

    def solved(solver: Any, callbacks: list[Any]) -> nn.Module:
        kept = {key: value for key, value in QUIET.items() if key != "num_sanity_val_steps"}
        package.Trainer(solver, max_epochs=2, batch_size=None, callbacks=callbacks, **kept).train()
        return solver

    known = conditions.Condition(input=label(inputs, ["x", "y"]), target=label(inputs.sum(1, keepdim=True), ["u"]))

    def supervised(callbacks: list[Any]) -> nn.Module:
        class Problem(problems.AbstractProblem):
            output_variables, input_variables = ["u"], ["x", "y"]
            conditions = {"data": known}  # noqa: RUF012 - as its base has it

        network = networks.FeedForward(input_dimensions=2, output_dimensions=1, layers=[4])
        return solved(solvers.SupervisedSolver(Problem(), network), callbacks)

    def informed(callbacks: list[Any]) -> nn.Module:
        problem = zoo.Poisson2DSquareProblem()
        problem.discretise_domain(n=4, mode="grid")
        network = networks.FeedForward(input_dimensions=2, output_dimensions=1, layers=[4])
        return solved(solvers.PINN(problem, network), callbacks)

    return {"SupervisedSolver": supervised, "PINN": informed}


# ------------------------------------------------------------------------------------- molecules, cells, words, routes


MOLECULES = ["C" * length + end for end in ("O", "N", "OC") for length in range(1, 6)] + ["c1ccccc1"]


def chemprop() -> Fits:
    data, models, layers = (import_module(f"chemprop.{name}") for name in ("data", "models", "nn"))

    def fit(task: str, callbacks: list[Any]) -> nn.Module:
        points = [data.MoleculeDatapoint.from_smi(name, [float(i % 2)]) for i, name in enumerate(MOLECULES)]
        batches = data.build_dataloader(data.MoleculeDataset(points), batch_size=8, shuffle=False)
        head = getattr(layers, task)(input_dim=6, hidden_dim=4)
        encoder = layers.BondMessagePassing(d_h=6, depth=2)
        return trained(models.MPNN(encoder, layers.MeanAggregation(), head), batches, callbacks)

    tasks = {"MPNN (regression)": "RegressionFFN", "MPNN (classification)": "BinaryClassificationFFN"}
    return {name: partial(fit, task) for name, task in tasks.items()}


def scvi() -> Fits:
    package, anndata = import_module("scvi"), import_module("anndata")
    counts = np.random.default_rng(0).integers(1, 9, size=(40, 6)).astype(np.float32)

    def fit(callbacks: list[Any]) -> nn.Module:
        cells = anndata.AnnData(counts)
        package.model.SCVI.setup_anndata(cells)
        model = package.model.SCVI(cells, n_hidden=3, n_latent=2)
        options = {"accelerator": "cpu", "enable_progress_bar": False, "shuffle_set_split": False}
        model.train(max_epochs=2, batch_size=9, callbacks=callbacks, **options)
        return model.module

    return {"SCVI": fit}


def transformers() -> Fits:
    package, module = import_module("transformers"), import_module("lightning.pytorch").LightningModule
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tokens = {"vocab_size": 12, "bos_token_id": 0, "eos_token_id": 1}

    class Wrapped(module):
        """What one finds in most repositories that train a model of transformers with Lightning."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **batch: Any) -> Any:
            return self.model(**batch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def fit(name: str, config: Any, callbacks: list[Any], *, of_sentences: bool = False) -> nn.Module:
        words = torch.from_numpy(np.random.default_rng(0).integers(2, 12, size=(16, 4)))
        labels = words.sum(1) % 3 if of_sentences else words
        examples = [
            {"input_ids": row, "attention_mask": torch.ones(4, dtype=torch.long), "labels": label}
            for row, label in zip(words, labels, strict=True)
        ]
        return trained(Wrapped(getattr(package, name)(config)), DataLoader(examples, batch_size=8), callbacks)

    bert = package.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes)
    gpt = package.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, **tokens)
    llama = package.LlamaConfig(max_position_embeddings=8, **sizes, **tokens)
    return {
        "BERT": partial(fit, "BertForSequenceClassification", bert, of_sentences=True),
        "GPT-2": partial(fit, "GPT2LMHeadModel", gpt),
        "Llama": partial(fit, "LlamaForCausalLM", llama),
    }


def rl4co() -> Fits:
    envs, zoo, trainers = (import_module(f"rl4co.{name}") for name in ("envs", "models", "utils"))

    def fit(callbacks: list[Any]) -> nn.Module:
        environment = envs.TSPEnv(generator_params={"num_loc": 5})
        policy = zoo.AttentionModelPolicy(
            env_name=environment.name, embed_dim=16, num_encoder_layers=1, num_heads=2, feedforward_hidden=8
        )
        sizes = {"batch_size": 8, "train_data_size": 16, "val_data_size": 8, "test_data_size": 8}
        model = zoo.POMO(environment, policy, **sizes)
        options = {key: value for key, value in QUIET.items() if key != "num_sanity_val_steps"}
        trainers.RL4COTrainer(max_epochs=2, callbacks=callbacks, **options).fit(model)
        return model

    return {"POMO": fit}


# ---------------------------------------------------------------------------------------------------------- the table

PACKAGES: dict[str, tuple[str, Callable[[], Fits]]] = {
    "lightning": ("lightning", lightning),
    "neuralforecast": ("pytorch_lightning", neuralforecast),
    "darts": ("pytorch_lightning", darts),
    "pytorch-forecasting": ("lightning", pytorch_forecasting),
    "gluonts": ("lightning", gluonts),
    "deeptab": ("lightning", deeptab),
    "pytorch-tabular": ("pytorch_lightning", pytorch_tabular),
    "pina-mathlab": ("lightning", pina),
    "chemprop": ("lightning", chemprop),
    "scvi-tools": ("lightning", scvi),
    "transformers": ("lightning", transformers),
    "rl4co": ("lightning", rl4co),
}
"""By the name on the package index: the Lightning that the package imports, and its modules."""


def neuralforecast_arguments() -> dict[str, Any]:
    windows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(waves(), 10)[:32].copy()).unsqueeze(2)
    inputs = {"insample_y": windows[:, :8], "insample_mask": torch.ones(32, 8, 1)}
    nothing = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
    return {
        "probe": (inputs, windows[:, 8:]),
        "behavior": lambda module, inputs: module({**inputs, **nothing}),
        "loss_fn": nn.functional.l1_loss,
    }


def chemprop_arguments() -> dict[str, Any]:
    data = import_module("chemprop.data")
    molecules = data.MoleculeDataset([data.MoleculeDatapoint.from_smi(name, [0.0]) for name in MOLECULES])

    def behavior(module: Any, indices: Any) -> Any:
        batch = data.collate_batch([molecules[index] for index in indices.tolist()])
        return module(batch.bmg, batch.V_d, batch.X_d)

    return {"probe": (torch.arange(16), (torch.arange(16.0) % 2).unsqueeze(1)), "behavior": behavior}


def scvi_arguments() -> dict[str, Any]:
    def mean(plan: Any, batch: Any) -> Any:
        return plan.module.inference(**plan.module._get_inference_input(batch))["qz"].loc

    return {"probe": 16, "behavior": mean}


ARGUMENTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "neuralforecast": ("probe=(windows, targets), behavior=..., loss_fn=...", neuralforecast_arguments),
    "chemprop": ("probe=(indices, targets), behavior=...", chemprop_arguments),
    "scvi-tools": ("behavior=...", scvi_arguments),
}
"""What to pass where `BasinMonitor()` alone does not give everything, by package."""
