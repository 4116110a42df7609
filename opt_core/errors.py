"""Every failure a user can cause, under one base class: a caller can catch them all at once.

Each message is one line that names the file or field, what was expected and what was received.
"""


class OPTError(Exception):
    """Base of every error this project raises for a user's input, file or setting."""

    # Keras wraps what a layer raises in several lines about its arguments, unless the error says
    # that it has them already: these messages say in one line what is wrong.
    _keras_call_info_injected = True
    ag_pass_through = True  # TensorFlow's AutoGraph does the same, and makes another error of it


class ConfigError(OPTError, ValueError):
    """A model configuration that is malformed, contradictory or not supported."""


class CheckpointError(OPTError, ValueError):
    """A weight file or folder that is missing, damaged, or does not fit its configuration."""


class MissingFileError(CheckpointError, ConfigError, OSError):
    """A file, folder or repository that is not there, or cannot be had."""


class MismatchError(CheckpointError, RuntimeError):
    """Weights that do not fit their configuration."""


class TokenizerError(OPTError, ValueError):
    """Tokenizer files that are missing or damaged, or ids that no token has."""


class GenerationError(OPTError, ValueError):
    """Generation settings, or a prompt, that cannot be honoured."""


class InputError(OPTError, ValueError):
    """Model inputs of wrong shape or range: ids outside the vocabulary, masks of another size."""


class ArgumentError(OPTError, TypeError):
    """An argument of a name that nothing here has, or of a kind that cannot be meant."""


class DataError(OPTError, ValueError):
    """Texts, labels or a prepared data set that cannot be used as they are."""


class TrainingError(OPTError, RuntimeError):
    """A training run that cannot start, go on, or be written down."""


class UnsupportedError(OPTError, NotImplementedError):
    """A method or class of `transformers` that this project does not have; it names its own."""


class AbsentError(OPTError, AttributeError):
    """An attribute that a result does not have here; it says how to get it."""
