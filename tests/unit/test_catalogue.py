"""The catalogue: where board files are found, what is said about broken ones, and that ours are right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import msgspec
import pytest

from qmpd import board as board_module
from qmpd.board import Board, BoardId, DiskBus, Part
from qmpd.catalogue import CACHE_FILE, MAX_FILE_BYTES, BoardProblem, Catalogue, contradictions, load, load_cached, search_path
from qmpd.errors import NotFound
from tests.guests.catalogue import load as load_guests

CHECKOUT = Path(__file__).resolve().parents[2]
MACHINES = CHECKOUT / "machines"

MINIMAL = """
title = "A board"
arch = "arm"
emulators = ["arm"]
machine = "virt"
memory = { default_mib = 128 }
"""


def written(directory: Path, name: str, text: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def shipped() -> Catalogue:
    return load([MACHINES])


@pytest.fixture
def somewhere(tmp_path: Path) -> Path:
    return tmp_path / "machines"


# --- where boards are found


def test_the_variable_comes_first_and_may_name_what_does_not_exist(tmp_path: Path) -> None:
    paths = search_path({"QMPD_MACHINES_PATH": f"{tmp_path}/one::{tmp_path}/two"})
    assert paths[:2] == (tmp_path / "one", tmp_path / "two")


def test_relative_directories_in_the_variable_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert search_path({"QMPD_MACHINES_PATH": "boards"})[0] == tmp_path / "boards"


def test_the_user_s_directory_is_found_through_xdg_config_home_or_home(tmp_path: Path) -> None:
    own = tmp_path / ".config/qmpd/machines"
    own.mkdir(parents=True)
    assert search_path({"HOME": str(tmp_path)})[0] == own
    assert search_path({"XDG_CONFIG_HOME": str(tmp_path / ".config"), "HOME": "/nonexistent"})[0] == own


def test_a_relative_xdg_config_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qmpd/machines").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert tmp_path / "qmpd/machines" not in search_path({"XDG_CONFIG_HOME": "."})


def test_without_any_variable_the_checkout_is_found() -> None:
    assert MACHINES in search_path({})


def test_no_directory_is_listed_twice() -> None:
    paths = search_path({"QMPD_MACHINES_PATH": f"{MACHINES}:{MACHINES}"})
    assert paths.count(MACHINES) == 1


# --- loading


def test_a_file_makes_a_board_of_its_name(somewhere: Path) -> None:
    file = written(somewhere, "my-board.toml", MINIMAL)
    named = load([somewhere]).get("my-board")
    assert (named.id, named.source, named.board.machine) == ("my-board", str(file), "virt")


def test_the_first_directory_wins(tmp_path: Path) -> None:
    written(tmp_path / "first", "a.toml", MINIMAL.replace("A board", "mine"))
    written(tmp_path / "second", "a.toml", MINIMAL)
    written(tmp_path / "second", "b.toml", MINIMAL)
    catalogue = load([tmp_path / "first", tmp_path / "second"])
    assert catalogue.get("a").board.title == "mine"
    assert list(catalogue.boards) == ["a", "b"]


def test_a_broken_file_hides_the_board_it_was_to_replace(tmp_path: Path) -> None:
    file = written(tmp_path / "first", "a.toml", MINIMAL + "colour = 'red'\n")
    written(tmp_path / "second", "a.toml", MINIMAL)
    catalogue = load([tmp_path / "first", tmp_path / "second"])
    with pytest.raises(NotFound, match=re.escape(str(file))) as caught:
        catalogue.get("a")
    assert caught.value.details["problems"] == [msgspec.to_builtins(catalogue.problems[0])]


def test_a_broken_file_leaves_the_others_alone(somewhere: Path) -> None:
    written(somewhere, "bad.toml", "this is not TOML")
    written(somewhere, "good.toml", MINIMAL)
    catalogue = load([somewhere])
    assert list(catalogue.boards) == ["good"]
    assert [Path(problem.file).name for problem in catalogue.problems] == ["bad.toml"]


def test_other_files_and_hidden_ones_are_left_alone(somewhere: Path) -> None:
    for name in ("README.md", ".#a.toml", "a.toml~"):
        written(somewhere, name, "neither TOML nor read")
    assert load([somewhere]) == Catalogue(boards={})


def test_a_missing_directory_is_a_problem_and_not_an_error(tmp_path: Path) -> None:
    catalogue = load([tmp_path / "nowhere"])
    assert catalogue.problems == (
        BoardProblem(file=str(tmp_path / "nowhere"), path="$", message="cannot be read: No such file or directory"),
    )


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        (MINIMAL + "colour = 'red'", "$", "unknown field `colour`"),
        (MINIMAL.replace("128", "'128'"), "$.memory.default_mib", "Expected `int`, got `str`"),
        (MINIMAL + "[disks.sd]\nroot = 1", "$.disks[...].root", "Expected `str | null`"),
        ("title = \n", "$", "this is not TOML: .*line 1"),
        ("a = " + "[" * 5000, "$", "this is not TOML"),
        (MINIMAL + "default_disk = 'virtio'", "$.default_disk", "'virtio' is not one of"),
    ],
)
def test_a_problem_names_the_place_in_the_document(somewhere: Path, text: str, path: str, message: str) -> None:
    file = written(somewhere, "a.toml", text)
    (problem,) = load([somewhere]).problems
    assert (problem.file, problem.path) == (str(file), path)
    assert re.search(message, problem.message)


def test_a_file_that_is_not_utf_8_is_a_problem(somewhere: Path) -> None:
    somewhere.mkdir()
    (somewhere / "a.toml").write_bytes(b"title = '\xff'")
    assert "not UTF-8" in load([somewhere]).problems[0].message


def test_a_file_of_unreasonable_size_is_not_read(somewhere: Path) -> None:
    written(somewhere, "a.toml", "#" * (MAX_FILE_BYTES + 1))
    assert f"at most {MAX_FILE_BYTES} bytes" in load([somewhere]).problems[0].message


def test_what_is_no_file_is_a_problem(somewhere: Path) -> None:
    (somewhere / "directory.toml").mkdir(parents=True)
    (somewhere / "dangling.toml").symlink_to(somewhere / "nowhere")
    assert [problem.message for problem in load([somewhere]).problems] == ["this is not a regular file"] * 2


def test_a_file_that_cannot_be_opened_is_a_problem(somewhere: Path) -> None:
    somewhere.mkdir()
    (somewhere / "a.toml").symlink_to(somewhere / "a.toml")
    (problem,) = load([somewhere]).problems
    assert problem.message.startswith(("cannot be read", "this is not a regular file"))


@pytest.mark.parametrize("name", ["Upper.toml", "_under.toml", "-a.toml", "a b.toml", "x" * 64 + ".toml"])
def test_a_name_that_is_no_id_is_a_problem(somewhere: Path, name: str) -> None:
    written(somewhere, name, MINIMAL)
    catalogue = load([somewhere])
    assert not catalogue.boards
    assert "the file's name is the board's id" in catalogue.problems[0].message


# --- looking up


def test_an_unknown_board_names_the_ones_that_look_alike(shipped: Catalogue) -> None:
    with pytest.raises(NotFound, match="aarch64-virt") as caught:
        shipped.get("aarch64-vrt")
    assert "aarch64-virt" in str(caught.value.details["closest"])


def test_a_part_of_an_id_is_enough_for_a_hint(shipped: Catalogue) -> None:
    with pytest.raises(NotFound, match="x86_64-q35"):
        shipped.get("q35")


def test_a_board_like_no_other_gets_no_hint() -> None:
    with pytest.raises(NotFound) as caught:
        Catalogue(boards={}).get("anything")
    assert caught.value.message == "there is no board 'anything'"


# --- contradictions


def board_with(text: str) -> Board:
    return msgspec.toml.decode(MINIMAL.replace("memory = { default_mib = 128 }\n", "") + text, type=Board)


MEMORY = "memory = { default_mib = 128 }\n"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("memory = { default_mib = 8, min_mib = 16 }", "$.memory.default_mib"),
        ("memory = { default_mib = 8, max_mib = 4 }", "$.memory.default_mib"),
        ("memory = { default_mib = 100, step_mib = 64 }", "$.memory.default_mib"),
        ("memory = { default_mib = 8, min_mib = 8, max_mib = 4 }", "$.memory.max_mib"),
        ("memory = { default_mib = 8, fixed = true }\nguest = { summary = '', expect = '', memory_mib = 4 }", "$.guest.memory_mib"),
        (MEMORY + "min_cpus = 4\nmax_cpus = 2", "$.max_cpus"),
        (MEMORY + "disks.a = {}", "$.disks.a.device"),
        (MEMORY + "disks.a = { device = 'x', drive_interface = 'sd' }", "$.disks.a.device"),
        (MEMORY + "disks.a = { drive_interface = 'sd', controller = 'x' }", "$.disks.a.controller"),
        (MEMORY + "disks.a = { device = 'x', bus = 'ide.{unit}' }", "$.disks.a.bus"),
        (MEMORY + "disks.a = { device = 'x', bus = 'ide.{' }", "$.disks.a.bus"),
        (MEMORY + "nics.a = {}", "$.nics.a.device"),
        (MEMORY + "nics.a = { device = 'x', on_board = 'x' }", "$.nics.a.device"),
        (MEMORY + "default_nic = 'virtio'", "$.default_nic"),
        (MEMORY + "guest = { summary = '', expect = '', kernel = '/k' }", "$.guest.kernel"),
        (MEMORY + "guest = { summary = '', expect = '', initrd = '/i' }", "$.guest.initrd"),
        (MEMORY + "guest = { summary = '', expect = '', dtb = '/d' }", "$.guest.dtb"),
        (MEMORY + "firmware = { bios = false }\nguest = { summary = '', expect = '', bios = '/b' }", "$.guest.bios"),
        (MEMORY + "guest = { summary = '', expect = '(' }", "$.guest.expect"),
        (MEMORY + "guest = { summary = '', expect = '', send = 'x', send_after = '(' }", "$.guest.send_after"),
        (MEMORY + "guest = { summary = '', expect = '', send_after = 'x' }", "$.guest.send_after"),
        (MEMORY + "guest = { summary = '', expect = '', devices = [{ id = 'x' }] }", "$.guest.devices[0].driver"),
    ],
)
def test_a_board_that_contradicts_itself_is_refused(text: str, path: str) -> None:
    assert [problem.path for problem in contradictions(board_with(text))] == [path]


def test_a_board_may_say_everything_at_once() -> None:
    text = """
    min_cpus = 2
    max_cpus = 4
    default_disk = "ide"
    default_nic = "lance"
    memory = { default_mib = 128, min_mib = 64, max_mib = 256, step_mib = 64 }
    kernel = { formats = ["ELF"] }
    disks.ide = { device = "ide-hd", bus = "ide.{index}", units = 2 }
    disks.scsi = { device = "scsi-hd", controller = "lsi53c895a" }
    disks.sd = { drive_interface = "sd" }
    nics.lance = { on_board = "lance" }
    [guest]
    summary = "one"
    kernel = "/kernel"
    initrd = "/initrd"
    memory_mib = 64
    expect = "^ok"
    send = "x"
    send_after = "y"
    devices = [{ driver = "isa-debugcon" }]
    """
    assert contradictions(board_with(text)) == []


# --- our own boards


def test_all_shipped_boards_are_right(shipped: Catalogue) -> None:
    assert shipped.problems == ()
    assert len(shipped.boards) >= 36


def test_every_architecture_that_can_boot_something_has_a_board(shipped: Catalogue) -> None:
    wanted = """aarch64 alpha arm avr cris hppa i386 loongarch64 m68k microblaze microblazeel mips mips64 mips64el mipsel nios2 or1k
    ppc ppc64 riscv32 riscv64 rx s390x sh4 sh4eb sparc sparc64 x86_64 xtensa"""
    assert set(wanted.split()) <= {named.board.arch for named in shipped.boards.values()}


def test_an_id_starts_with_the_architecture(shipped: Catalogue) -> None:
    assert [name for name, named in shipped.boards.items() if not name.startswith(f"{named.board.arch}-")] == []


def test_guests_of_this_project_exist(shipped: Catalogue) -> None:
    known = load_guests().boards
    for name, named in shipped.boards.items():
        guest = named.board.guest
        if guest is not None and guest.source is not None and guest.source.startswith("tests/guests:"):
            assert guest.source == f"tests/guests:{name}"
            assert name in known
            assert guest.expect == f"BM-OK {name}"


def test_files_of_a_guest_come_from_packages_that_are_named(shipped: Catalogue) -> None:
    for name, named in shipped.boards.items():
        guest = named.board.guest
        if guest is not None and (guest.kernel or guest.bios):
            assert guest.packages, name


def test_a_disk_bus_tells_the_guest_s_name_for_its_first_disk(shipped: Catalogue) -> None:
    buses: list[tuple[str, DiskBus]] = [(name, bus) for name, named in shipped.boards.items() for bus in named.board.disks.values()]
    assert [name for name, bus in buses if bus.root is None] == []


def structs() -> list[type[Part]]:
    return [kind for kind in vars(board_module).values() if isinstance(kind, type) and issubclass(kind, Part) and kind is not Part]


@pytest.mark.parametrize("kind", structs(), ids=lambda kind: kind.__name__)
def test_the_readme_explains_every_field(kind: type[Part]) -> None:
    readme = (MACHINES / "README.md").read_text(encoding="utf-8")
    assert [field for field in kind.__struct_fields__ if f"`{field}`" not in readme] == []


def test_the_readme_s_examples_are_boards(tmp_path: Path) -> None:
    readme = (MACHINES / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        written(tmp_path, f"example-{number}.toml", example)
    assert load([tmp_path]).problems == ()


def test_ids_are_ids(shipped: Catalogue) -> None:
    assert [msgspec.convert(name, BoardId) for name in shipped.boards] == list(shipped.boards)


def test_the_cache_says_what_the_files_say(tmp_path: Path) -> None:
    for _ in range(2):
        assert load_cached([MACHINES], tmp_path) == load([MACHINES])
    assert (tmp_path / CACHE_FILE).exists()


def test_a_file_that_came_changed_or_went_is_noticed(tmp_path: Path) -> None:
    boards, cache = tmp_path / "boards", tmp_path / "cache"
    shutil.copytree(MACHINES, boards)
    load_cached([boards], cache)
    (boards / "new.toml").write_bytes((MACHINES / "x86_64-q35.toml").read_bytes())
    assert "new" in load_cached([boards], cache).boards
    text = (boards / "new.toml").read_text()
    (boards / "new.toml").write_text(text.replace('title = "', 'title = "Another ', 1))
    assert load_cached([boards], cache).get("new").board.title.startswith("Another ")
    (boards / "new.toml").write_text("nonsense")
    assert load_cached([boards], cache).problems
    (boards / "new.toml").unlink()
    assert load_cached([boards], cache) == load([boards])


@pytest.mark.parametrize("junk", [b"", b"junk", b"\xc1"])
def test_a_cache_that_is_damaged_or_cannot_be_written_costs_time_only(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / CACHE_FILE).write_bytes(junk)
    assert load_cached([MACHINES], tmp_path) == load([MACHINES])
    blocked = tmp_path / "a-file"
    blocked.write_bytes(b"")
    assert load_cached([MACHINES], blocked / "cache") == load([MACHINES])


def test_a_directory_that_is_not_there_is_looked_for_each_time(tmp_path: Path) -> None:
    later = tmp_path / "later"
    assert "new" not in load_cached([later, MACHINES], tmp_path).boards
    later.mkdir()
    (later / "new.toml").write_bytes((MACHINES / "x86_64-q35.toml").read_bytes())
    assert "new" in load_cached([later, MACHINES], tmp_path).boards
