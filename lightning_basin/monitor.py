"""The name of earlier versions, for scripts that import it: use `lightning_basin.BasinMonitor`."""

from lightning_basin.callback.monitor import BasinMonitor

__all__ = ["BasinMonitor"]
