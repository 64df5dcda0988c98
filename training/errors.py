"""Errors that end a training run."""


class TrainingError(RuntimeError):
    """A run cannot continue; the message says why. The live policy stays as it is."""


class RunAbortedError(TrainingError):
    """An operator asked for the run to end."""
