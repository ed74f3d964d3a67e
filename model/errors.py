"""What can go wrong in `model`, split by who has to act.

    ModelError
    ├── DataError            the images, captions or revision handed in
    │   └── RevisionError    a data revision that is missing, dirty or not what it says
    ├── ConfigError          the choice of tier, configuration, size or sampler
    ├── CheckpointError      a file of weights that is truncated, foreign or of another shape
    ├── TrainingError        the run itself diverged; the last good checkpoint is kept
    └── ExportError          the exported model does not compute what the trained one computes

Each message is one sentence that says what to do next.
"""


class ModelError(Exception):
    """Base of everything that `model` raises on purpose."""


class DataError(ModelError):
    """The data cannot be used as they are."""


class RevisionError(DataError):
    """A data revision is missing, has uncommitted changes, or its bytes are not the ones that were recorded."""


class ConfigError(ModelError):
    """A tier, configuration, image size or sampler that does not exist or does not fit."""


class CheckpointError(ModelError):
    """A checkpoint that cannot be read or belongs to another network."""


class TrainingError(ModelError):
    """Training diverged."""


class ExportError(ModelError):
    """The exported model failed its own check."""
