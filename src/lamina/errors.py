"""What can go wrong for a user. Every message names the thing, its value, what is allowed, and the remedy."""


class LaminaError(Exception):
    """A failure the user can act on. The command line prints it without a traceback and exits with code 2."""


class ConfigError(LaminaError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(LaminaError):
    """A dataset, a file in it, or a stream made from it is not what it should be."""


class BackboneError(LaminaError):
    """Pre-trained weights are missing, damaged, or do not fit their architecture."""


class MethodError(LaminaError):
    """A method cannot do what is asked of it, for example learn a scenario it does not fit."""


class CheckpointError(LaminaError):
    """Saved state is damaged or belongs to something else."""


class RunError(LaminaError):
    """A run directory is in use, finished, missing, or not a run directory."""


class TrainingError(LaminaError):
    """Training cannot go on, for example because the loss is not finite."""
