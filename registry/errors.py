"""Errors of `registry`, split by who has to act.

    RegistryError
    ├── CatalogError     a model, version, alias or hash that does not exist, or a version that the ledger has no seal of
    ├── PromotionError   a version may not become champion, or there is none to roll back to
    ├── RatingError      answers that do not fit their sheet, or a sheet that cannot give a result
    ├── LedgerError      the ledger was changed outside ferry, or entries are missing
    ├── SealError        MLflow holds other files of a version than those that the gate saw
    └── StoreError       MLflow, the database or another store refused or cannot be reached

Each message is one sentence that says what to do next.
"""


class RegistryError(Exception):
    """Base class of all errors that `registry` raises on purpose."""


class CatalogError(RegistryError):
    """A model, version, alias or hash that does not exist or is misspelt, or a version that the ledger has no seal of."""


class PromotionError(RegistryError):
    """A version may not become champion in the present state, or there is no champion to roll back to."""


class RatingError(RegistryError):
    """Answers that do not fit their sheet, or a sheet that cannot give a result."""


class LedgerError(RegistryError):
    """An entry of the ledger was changed or removed, or was added outside ferry."""


class SealError(RegistryError):
    """A file of a version in MLflow is missing, or does not have the hash that is in the ledger."""


class StoreError(RegistryError):
    """MLflow, the database or another store refused a request or cannot be reached."""
