import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scaling_data() -> Path:
    """The folder of published data, or a skip that says where it was sought."""
    folder = Path(
        os.environ.get("MOE_LAB_DATA") or Path(__file__).parents[2].parent / "shared" / "data"
    )
    if not (folder / "scaling").is_dir():
        pytest.skip(f"no published data in {folder}: set MOE_LAB_DATA")
    return folder
