"""Errors that `model` raises, grouped by what has to be corrected.

    ModelError
    ├── DataError            the images, captions or revision handed in
    │   ├── RevisionError    a data revision that is missing, unrecorded or damaged; a failure of Git or DVC
    │   └── OwnerError       Git does not read the workspace, because it belongs to another user
    ├── ConfigError          the choice of tier, configuration, size or sampler
    ├── CheckpointError      a file of weights that is truncated, foreign or of another shape
    ├── TrainingError        the run diverged; its last saved state is kept
    └── ExportError          a model that cannot be exported, or whose export computes something else

Each message is one sentence and says what to do next.
"""


class ModelError(Exception):
    """Base class of all errors that `model` raises deliberately."""


class DataError(ModelError):
    """The data cannot be used as they are."""


class RevisionError(DataError):
    """A data revision is missing, has unrecorded changes or damaged bytes, or Git or DVC fails."""


class OwnerError(DataError):
    """Git does not read a repository, because another user owns it. It is no RevisionError: nothing is known of what is recorded."""


class ConfigError(ModelError):
    """A tier, configuration, image size or sampler that does not exist or does not fit."""


class CheckpointError(ModelError):
    """A checkpoint that cannot be read or belongs to another network."""


class TrainingError(ModelError):
    """Training diverged, or its loss or weights are not finite."""


class ExportError(ModelError):
    """A model cannot be exported or loaded, or the exported model failed its check."""
