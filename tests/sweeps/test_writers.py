from pathlib import Path

import pytest
from writers import compete, lost


@pytest.mark.slow
def test_many_writers_on_one_store_lose_nothing(tmp_path: Path):
    compete(tmp_path, writers=24, number=40)
    assert lost(tmp_path, writers=24, number=40) == []
