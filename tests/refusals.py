"""The errors that tests expect: their type and the field that they name, not their sentence."""

from typing import Any

import pytest

from moe_lab.errors import ConfigError, MoELabError


def refused(field: str, error: type[MoELabError] = ConfigError) -> Any:
    """A block that must end in an ``error`` whose ``field`` is that one, in one line."""
    return pytest.raises(
        error, check=lambda raised: raised.field == field and "\n" not in str(raised)
    )
