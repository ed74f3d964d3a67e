"""What can go wrong in `registry`, split by who has to act.

    RegistryError
    ├── CatalogError     a model, version or alias that does not exist
    ├── PromotionError   the gate did not let this version through, and nobody overruled it
    ├── RatingError      people's answers that do not fit the sheet, or a sheet that could say nothing
    ├── LedgerError      the record of decisions was changed after the fact
    ├── SealError        MLflow holds other files of a version than the gate saw
    └── StoreError       MLflow or the database cannot be reached

Each message is one sentence that says what to do next.
"""


class RegistryError(Exception):
    """Base of everything that `registry` raises on purpose."""


class CatalogError(RegistryError):
    """There is no such model, version or alias."""


class PromotionError(RegistryError):
    """A version that may not become champion as things stand."""


class RatingError(RegistryError):
    """Answers that do not fit their sheet, or a sheet from which nothing could be learned."""


class LedgerError(RegistryError):
    """An entry of the ledger does not have the hash that the next one names."""


class SealError(RegistryError):
    """A file of a version is not the one that the ledger has the hash of, or is lost."""


class StoreError(RegistryError):
    """MLflow or the database refused or cannot be reached."""
