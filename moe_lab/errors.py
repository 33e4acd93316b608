"""The errors a user can meet. Each message says what was expected, what was given, and what to try.

The command line prints such an error as one line and exits with code 2; anything else is a bug and
shows its traceback.
"""

import re
from collections.abc import Callable


class MoELabError(Exception):
    """Base class of errors caused by user input.

    Attributes:
        field: name of the field, option, column or entry that does not fit; "" if the message is
            about more than one.
    """

    def __init__(self, message: str = "", field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ConfigError(MoELabError, ValueError):
    """A configuration that contradicts itself or asks for something that does not exist.

    It is a ``ValueError`` too, so that code which expects one of a wrong argument meets it.
    """


class CorpusError(MoELabError):
    """Text that is missing, empty, binary, or too short for the request."""


class TraceError(MoELabError):
    """A trace that is damaged, incomplete, of another version, or whose counts do not add up."""


class CheckpointError(MoELabError):
    """A checkpoint that is damaged or belongs to another configuration."""


class RunError(MoELabError):
    """A run, sweep or recipe that cannot be read, started or continued."""


class StorageError(RunError):
    """A disk or a store cannot be read or written. The run itself did not fail and can continue."""


class TraceExistsError(TraceError):
    """A finished trace is in the folder of a new one, and replacing it was not requested.

    ``got`` describes the trace, so that a caller can name its own option.
    """

    def __init__(self, got: str, option: str = "overwrite=True") -> None:
        super().__init__(expected("a new folder", got, f"{option}, or another folder"))
        self.got = got


class TraceStorageError(StorageError, TraceError):
    """A trace cannot be written: the disk is full, or the folder is read-only."""


class ArgumentError(TraceError):
    """A value that the caller can give is missing from a source, or contradicts it.

    Args:
        what, got: of the message.
        hint: its last part, with the arguments that help in braces: ``"{config} or {top_k}"``.
        where: the file or record, before the sentence.
        field: what does not fit; the last of the arguments where it is not given.
    """

    def __init__(
        self, what: str, got: object, hint: str, where: object = "", field: str = ""
    ) -> None:
        self.what, self.got, self.hint, self.where = what, got, hint, where
        arguments = re.findall(r"\{(\w+)\}", hint)
        super().__init__(self.message("{}=".format), field or arguments[-1])

    def message(self, spell: Callable[[str], str]) -> str:
        """The sentence with each argument's name as ``spell`` writes it."""
        hint = re.sub(r"\{(\w+)\}", lambda match: spell(match[1]), self.hint)
        return (f"{self.where}: " if self.where else "") + expected(self.what, self.got, hint)


class FieldError(ConfigError):
    """A field of a configuration has a value of the wrong type.

    ``what`` is its type in words, ``example`` a value that fits.
    """

    def __init__(self, field: str, what: str, got: str, example: str) -> None:
        self.what, self.got, self.example = what, got, example
        super().__init__(expected(f"{field} as {what}", got, f"{field}={example}"), field)


class AlarmError(RunError):
    """An alarm ended a training whose ``on_alarm`` is "stop"; ``field`` names the kind of alarm."""


class BusyError(RunError):
    """Another process is training this run."""


class AnalysisError(MoELabError):
    """The requested statistic cannot be computed from the data."""


def require(
    condition: object,
    what: str,
    got: object,
    hint: str = "",
    error: Callable[[str, str], MoELabError] = ConfigError,
    where: object = "",
    field: str = "",
) -> None:
    """Raise ``error("<where>: expected <what>, got <got>; try <hint>")`` unless ``condition``.

    ``field`` becomes the error's attribute of that name. All arguments are evaluated each time.
    """
    if not condition:
        raise error((f"{where}: " if where else "") + expected(what, got, hint), field)


def expected(what: str, got: object, hint: str = "") -> str:
    """The one sentence form of all our messages: ``expected ..., got ...; try ...``."""
    return f"expected {what}, got {got}" + (f"; try {hint}" if hint else "")
