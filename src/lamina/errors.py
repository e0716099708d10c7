"""Errors that a user can act on. Every message says what is wrong, the value found, what is allowed, and what to do."""


class LaminaError(Exception):
    """An error the user can act on. The command prints it without a traceback and exits with code 2."""


class ConfigError(LaminaError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(LaminaError):
    """A dataset, a file in it, or a stream made from it is invalid."""


class BackboneError(LaminaError):
    """Pre-trained weights are missing, damaged, or do not fit their architecture."""


class MethodError(LaminaError):
    """A method does not support the request, for example the scenario of the stream."""


class CheckpointError(LaminaError):
    """Saved state is damaged or belongs to something else."""


class RunError(LaminaError):
    """A run directory is in use, finished, missing, or not a run directory."""


class ModelError(LaminaError):
    """The directory of a model is in use, damaged, missing, or no model; or what is asked of the model cannot be done."""


class TrainingError(LaminaError):
    """Training cannot continue, for example because the loss is not finite."""
