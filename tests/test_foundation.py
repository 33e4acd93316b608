"""Floor 0: errors, configs and atomic files; and that rooms import from lower floors only."""

import ast
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

import moe_lab
from moe_lab.config import Config
from moe_lab.errors import RunError, expected
from moe_lab.files import atomic_path, content_hash, private_folder, write_text
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, ControllerKind, RouterConfig

PACKAGE = Path(moe_lab.__file__).parent
FLOORS = {
    "errors": 0, "config": 0, "files": 0, "versions": 0, "lazy": 0, "cost": 0, "measures": 0,
    "number_format": 0, "plugins": 0, "registry": 0, "document_pass": 0, "sandbox": 0,
    "plain_text": 0, "progress": 0, "terminal": 0, "html_table": 0, "hf": 0, "compiled": 0,
    "cpu_kernels": 0, "seed_intervals": 0, "free_memory": 0, "worker_processes": 0,
    "runs": 1, "json_input": 0,
    "routing": 1, "text": 1,
    "model": 2,
    "accounting": 3,
    "trace": 4,
    "training": 5, "analysis": 5, "scaling": 5,
    "serving": 6, "sweeps": 6, "worth": 6,
    "report": 7,
    "watch": 8,
    "commands": 9, "cli": 9,
    "__main__": 10,
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Rooms that a file names in an import, wherever the import stands; TYPE_CHECKING blocks and
    commands run by the user apart.
    """
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        rooms |= {name.split(".")[1] for name in names if name.startswith("moe_lab.")}
    return rooms


@pytest.mark.parametrize("room", sorted(FLOORS))
def test_a_room_imports_from_lower_floors_only(room: str) -> None:
    paths = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for path in paths:
        allowed = {
            other for other, floor in FLOORS.items() if floor < FLOORS[room] or floor == 0
        } | {room}
        found = imports_of(path)
        assert found <= allowed, f"{path.relative_to(PACKAGE)} imports {sorted(found - allowed)}"


def test_every_room_of_the_package_has_a_floor() -> None:
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__", "recipes"} == set(FLOORS)


def test_expected_has_the_one_sentence_form() -> None:
    assert expected("k of at least 1", 0) == "expected k of at least 1, got 0"
    assert expected("k", 0, "k=1") == "expected k, got 0; try k=1"


CONTROLLER = ControllerConfig(ControllerKind.PROPORTIONAL, 0.5, 2.0)
ROUTER = RouterConfig(
    kind="longcat", num_experts=4, num_zero_experts=2, top_k=3, controller=CONTROLLER
)
DEEP = DecoderConfig(d_model=16, moe=MoEConfig(16, 8, ROUTER))


def test_a_nested_config_round_trips_through_json_values() -> None:
    values = DEEP.to_dict()
    assert values["moe"]["router"]["controller"]["kind"] == "proportional"
    assert type(values["moe"]["router"]["controller"]["kind"]) is str
    assert DecoderConfig.from_dict(values) == DEEP


def test_the_hash_changes_with_any_field_however_deep() -> None:
    other = ControllerConfig(ControllerKind.PROPORTIONAL, 0.25, 2.0)
    assert DEEP.moe is not None
    changed = DEEP.replace(moe=DEEP.moe.replace(router=DEEP.moe.router.replace(controller=other)))
    assert changed.hash() != DEEP.hash() == DecoderConfig.from_dict(DEEP.to_dict()).hash()


def test_an_unknown_field_or_choice_is_named() -> None:
    with refused("experts"):
        RouterConfig.from_dict({"experts": 4})
    with refused("a controller kind"):
        ControllerConfig.from_dict({"kind": "warp"})


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()))
def test_the_content_hash_does_not_depend_on_key_order(values: dict[str, object]) -> None:
    assert content_hash(values) == content_hash(dict(reversed(list(values.items()))))


@dataclass(frozen=True)
class Pair(Config):
    sizes: tuple[int, ...] = ()
    label: str | None = None


def test_tuples_and_options_survive_json() -> None:
    assert Pair.from_dict({"sizes": [1, 2], "label": None}) == Pair((1, 2))


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_text(target, "old")

    def write_half() -> None:
        with atomic_path(target) as path:
            path.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(RunError, match=r"cannot write .*; try another folder or free some space"):
        write_text(blocker / "below", "text")
    if os.geteuid() != 0:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(RunError, match="cannot write"):
            write_text(tmp_path / "new", "text")


def test_a_private_folder_is_of_this_user_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "scratch")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert private_folder(folder) == folder
    folder.chmod(0o755)
    with pytest.raises(RunError, match="expected a folder of this user alone"):
        private_folder(folder)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(RunError, match="expected a folder of this user alone"):
        private_folder(tmp_path / "link")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, moe_lab; "
        "print(sorted({'torch', 'numpy', 'scipy', 'polars', 'plotly'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    "package",
    ["moe_lab.trace", "moe_lab.analysis", "moe_lab.analysis.difficulty", "moe_lab.worth"],
)
def test_names_imported_on_first_use_are_those_of_the_package(package: str) -> None:
    code = f"""
import importlib, sys
module = importlib.import_module({package!r})
assert "torch" not in sys.modules
assert all(getattr(module, name) is not None for name in module.__all__)
assert "torch" in sys.modules
assert not hasattr(module, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_submodules_with_lazy_names_can_be_reached_from_their_package() -> None:
    code = (
        "import moe_lab.trace as t; print(t.importing.ImportKind.VLLM, "
        "t.capturing.recorder.capture is t.capture)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "vllm True\n"
    )
