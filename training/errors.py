"""What can go wrong in a training run."""


class TrainingError(RuntimeError):
    """A run cannot go on; the message says why. The policy that is live stays as it is."""


class RunAbortedError(TrainingError):
    """Somebody asked for the run to end."""
