"""The error vocabulary: one class per thing a caller does differently.

Every message is one sentence for the person who must act: what, where, got against expected, what to do.
The command line prints it without a traceback and leaves with `exit_code`. Errors cross Ray by pickle, so each
takes the message and nothing else.
"""

from __future__ import annotations


class EupeError(Exception):
    """Root of everything that eupe raises on purpose."""

    exit_code = 2


class ConfigError(EupeError, ValueError):
    """An option, or a combination of options, that cannot work."""


class CorpusError(EupeError, ValueError):
    """The pictures are missing, empty, or not the ones that were indexed."""


class TeacherError(EupeError, ValueError):
    """An unknown teacher, weights that do not fit it, or a size it cannot take."""


class WorkerDiedError(TeacherError):
    """A process died while it loaded a teacher; another may have more luck."""


class StoreError(EupeError, ValueError):
    """A store that cannot be used as asked."""


class SpecMismatchError(StoreError):
    """The store holds features made to another specification."""


class FormatVersionError(StoreError):
    """The store was written in a format that this version does not know."""


class PartCorruptError(StoreError):
    """Stored bytes are missing or fail their checksum."""


class StorageError(EupeError, OSError):
    """The disk refused: full, read-only, gone. What was committed before stands."""

    exit_code = 1


class OutageError(StorageError):
    """The storage does not answer now; the same request may succeed later."""


class RunError(EupeError, ValueError):
    """A training run's directory that is missing, incomplete or in use for something else."""


class TrainingError(EupeError, RuntimeError):
    """Training stopped itself before doing harm (a non-finite loss, say)."""

    exit_code = 1


class DriftError(EupeError, RuntimeError):
    """A teacher computed anew gives other features than the store holds."""

    exit_code = 1


class ConformanceError(EupeError, RuntimeError):
    """An adapter gives other tokens than its library's own forward pass, or an export than the run it was made from."""

    exit_code = 1


class IncompleteError(EupeError, RuntimeError):
    """The work ended with gaps; what is whole is committed, and the same command goes on."""

    exit_code = 1


class StepError(EupeError, RuntimeError):
    """A step of a pipeline failed; its `exit_code` is that command's own."""

    exit_code = 1
