"""Any file's name as text, and back: where the documents say that these two functions are."""

from eupe.common.files import key_of, name_of

__all__ = ["key_of", "name_of"]
