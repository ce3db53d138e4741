"""Lightning as the tests import it: with ``LIGHTNING=pytorch_lightning`` in the environment, the other package."""

import os
from importlib import import_module

PACKAGE = os.environ.get("LIGHTNING", "lightning.pytorch")

pytorch = import_module(PACKAGE)
callbacks = import_module(f"{PACKAGE}.callbacks")
loggers = import_module(f"{PACKAGE}.loggers")
profilers = import_module(f"{PACKAGE}.profilers")
strategies = import_module(f"{PACKAGE}.strategies")

Callback = pytorch.Callback
LightningModule = pytorch.LightningModule
Trainer = pytorch.Trainer

BatchSizeFinder = callbacks.BatchSizeFinder
EarlyStopping = callbacks.EarlyStopping
EMAWeightAveraging = callbacks.EMAWeightAveraging
GradientAccumulationScheduler = callbacks.GradientAccumulationScheduler
LearningRateFinder = callbacks.LearningRateFinder
ModelCheckpoint = callbacks.ModelCheckpoint
OnExceptionCheckpoint = callbacks.OnExceptionCheckpoint
StochasticWeightAveraging = callbacks.StochasticWeightAveraging
WeightAveraging = callbacks.WeightAveraging
EarlyStoppingReason = callbacks.early_stopping.EarlyStoppingReason

CSVLogger = loggers.CSVLogger
CometLogger = loggers.CometLogger
Logger = loggers.Logger
MLFlowLogger = loggers.MLFlowLogger
TensorBoardLogger = loggers.TensorBoardLogger
WandbLogger = loggers.WandbLogger

PassThroughProfiler = profilers.PassThroughProfiler
SimpleProfiler = profilers.SimpleProfiler

DDPStrategy = strategies.DDPStrategy
ModelParallelStrategy = strategies.ModelParallelStrategy

CombinedLoader = import_module(f"{PACKAGE}.utilities").CombinedLoader
MisconfigurationException = import_module(f"{PACKAGE}.utilities.exceptions").MisconfigurationException
Tuner = import_module(f"{PACKAGE}.tuner").Tuner
