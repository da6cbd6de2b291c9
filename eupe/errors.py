"""Exceptions of eupe: one class for each case that callers handle differently.

Every message is one sentence for the person who must act: what, where, got against expected, what to do.
The command line prints it without a traceback and exits with `exit_code`. Errors cross Ray by pickle, so each
takes the message and nothing else.
"""

from __future__ import annotations


class EupeError(Exception):
    """Base class of every error that eupe raises on purpose."""

    exit_code = 2


class ConfigError(EupeError, ValueError):
    """An option, or a combination of options, that cannot work."""


class CorpusError(EupeError, ValueError):
    """Pictures that are missing, empty, or not those that were indexed."""


class TeacherError(EupeError, ValueError):
    """An unknown teacher, weights that do not fit it, or a size that it cannot take."""


class WorkerDiedError(TeacherError):
    """A process that died while it loaded a teacher; another process may succeed."""


class StoreError(EupeError, ValueError):
    """A store that cannot be used as requested."""


class SpecMismatchError(StoreError):
    """A store whose features were made to another specification."""


class FormatVersionError(StoreError):
    """A store in a format that this version does not know."""


class PartCorruptError(StoreError):
    """Stored bytes that are missing or fail their checksum."""


class StorageError(EupeError, OSError):
    """A request that the storage refused: it is full, read-only or gone. What was committed before is intact."""

    exit_code = 1


class OutageError(StorageError):
    """Storage that does not answer now; the same request may succeed later."""


class RunError(EupeError, ValueError):
    """A training run's directory that is missing, incomplete or in use for something else."""


class TrainingError(EupeError, RuntimeError):
    """Training that stopped itself before doing harm, for example at a non-finite loss."""

    exit_code = 1


class DriftError(EupeError, RuntimeError):
    """A teacher that now computes other features than the store holds."""

    exit_code = 1


class ConformanceError(EupeError, RuntimeError):
    """An adapter whose tokens differ from its library's own forward pass, or an export that differs from its run."""

    exit_code = 1


class IncompleteError(EupeError, RuntimeError):
    """Work that ended with gaps; what is whole is committed, and the same command resumes the rest."""

    exit_code = 1


class StepError(EupeError, RuntimeError):
    """A failed step of a pipeline; its `exit_code` is that of the step's command."""

    exit_code = 1
