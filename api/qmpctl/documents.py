"""Machine definitions as files: reading TOML, JSON and msgpack, naming everything that is wrong, and writing them back."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from qmpd.errors import Invalid, Problem, QmpdError, Undecodable
from qmpd.spec import NAME_PATTERN, MachineSpec, explained

Tree = dict[str, object]
T = TypeVar("T")

STDIN: Final = "-"
#: Where a definition holds paths of files; `*` is every element of a list.
PATHS: Final = (
    ("kernel", "image"),
    ("kernel", "initrd"),
    ("kernel", "dtb"),
    ("firmware", "path"),
    ("firmware", "code"),
    ("firmware", "vars"),
    ("disks", "*", "path"),
)
#: How msgspec says where a value is, and how it calls what should not, or should, be there.
_WHERE: Final = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$.*)`)?$", re.DOTALL)
_FIELD: Final = re.compile(r"^Object (?P<fault>contains unknown|missing required) field `(?P<name>[^`]*)`")
_STEP: Final = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[(\d+)\]")
#: A definition with more mistakes than this is not the document its author thinks it is.
MAX_PROBLEMS: Final = 50


def is_name(text: str) -> bool:
    """Whether an argument that may be a file or a machine is a machine: a file name has a dot or a slash, a machine's never."""
    return re.match(NAME_PATTERN, text) is not None


def read(file: str, *, name: str | None = None) -> MachineSpec:
    """The definition in a file, or on stdin for `-`; `name` overrides the one in it. Relative paths in it start where the file is.

    Raises Undecodable for what is no document, Invalid with every structural problem, and QmpdError if it cannot be read.
    """
    if file == STDIN:
        return spec_of(decoded(sys.stdin.buffer.read(), "", "stdin"), Path.cwd(), name=name)
    path = Path(file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise QmpdError(f"cannot read {file}: {error.strerror}") from error
    return spec_of(decoded(data, path.suffix, file), path.parent.resolve(), name=name)


def decoded(data: bytes, suffix: str, source: str) -> Tree:
    """The tree of a document; without a suffix its first byte tells the format."""
    decode = _DECODERS.get(suffix.lower() or _sniffed(data))
    if decode is None:
        raise Undecodable(f"{source}: a definition's file name ends in {', '.join(sorted(_DECODERS))}")
    try:
        tree = decode(data)
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise Undecodable(f"{source}: {error}") from error
    if not isinstance(tree, dict):
        raise Undecodable(f"{source}: a definition is a table of fields, this is a {type(tree).__name__}")
    return tree


def spec_of(tree: Tree, base: Path, *, name: str | None = None) -> MachineSpec:
    """A tree as a definition, its relative paths made absolute below `base`; Invalid with every structural problem."""
    if name is not None:
        tree = {**tree, "name": name}
    for steps in PATHS:
        _make_absolute(tree, steps, base)
    try:
        return msgspec.convert(tree, MachineSpec)
    except msgspec.ValidationError:
        problems = tuple(structural_problems(tree))
        raise Invalid(problems[0].message, problems) from None


def structural_problems(tree: Tree) -> Iterator[Problem]:
    """What in a tree cannot be decoded. Decoding stops at the first problem, so each is taken out and the rest tried again.

    Where a part cannot do without what was taken out, the part goes, too: a second problem in it shows when the first is mended.
    """
    removed: set[str] = set()
    for _ in range(MAX_PROBLEMS):
        try:
            msgspec.convert(tree, MachineSpec)
        except msgspec.ValidationError as error:
            path, what = _placed(str(error))
        else:
            return
        if path in removed:
            path = _holder_of(path)
        else:
            yield Problem(path=path, message=_plainly(what))
        removed.add(path)
        try:
            tree = _without(tree, path)
        except (KeyError, IndexError):
            return


def _placed(message: str) -> tuple[str, str]:
    """Where msgspec found a problem, a field it names included, and which."""
    found = _WHERE.match(message)
    what, path = (found["what"], found["path"] or "$") if found else (message, "$")
    field = _FIELD.match(what)
    return (path if field is None else f"{path}.{field['name']}"), what


def _holder_of(path: str) -> str:
    """The field whose value a field belongs to: of one in an element of a list, the list's, for the others must keep their numbers."""
    return re.sub(r"(\[\d+\])*$", "", path.rpartition(".")[0])


def toml_of(document: msgspec.Struct) -> str:
    """A document as TOML; QmpdError if it holds a null, which TOML has no word for."""
    import tomli_w

    tree: object = msgspec.to_builtins(document)
    try:
        return tomli_w.dumps(tree if isinstance(tree, dict) else {})
    except TypeError as error:
        raise QmpdError("this document holds a null, which TOML cannot express: use --format json") from error


def _plainly(what: str) -> str:
    if what.startswith("Object missing required field"):
        return "this field is required"
    if what.startswith("Object contains unknown field"):
        return "there is no such field"
    what = explained(what)
    return what[:1].lower() + what[1:]


def _without(tree: Tree, path: str) -> Tree:
    """A copy of the tree without what is at `path`; raises KeyError where the path cannot be followed or ends in a list."""
    matches = list(_STEP.finditer(path, 1))
    if not matches or 1 + sum(len(match[0]) for match in matches) != len(path):
        raise KeyError(path)
    copy: Tree = msgspec.convert(msgspec.to_builtins(tree), Tree)
    holder: object = copy
    for match in matches[:-1]:
        holder = _child(holder, match)
    if not isinstance(holder, dict):
        raise KeyError(path)
    del holder[matches[-1][1]]
    return copy


def _child(holder: object, step: re.Match[str]) -> object:
    if isinstance(holder, dict) and step[1]:
        child: object = holder[step[1]]
        return child
    if isinstance(holder, list) and step[2]:
        element: object = holder[int(step[2])]
        return element
    raise KeyError(step[0])


def _make_absolute(node: object, steps: tuple[str, ...], base: Path) -> None:
    step, rest = steps[0], steps[1:]
    if step == "*":
        for element in node if isinstance(node, list) else ():
            _make_absolute(element, rest, base)
        return
    if not isinstance(node, dict) or step not in node:
        return
    value = node[step]
    if rest:
        _make_absolute(value, rest, base)
    elif isinstance(value, str) and value:
        node[step] = absolute(value, base)


def absolute(path: str, base: Path) -> str:
    """A path as the daemon needs it. A last component that is a symbolic link stays one: it may lead elsewhere when the machine starts."""
    if path.startswith("/"):
        return path
    whole = base / path
    return str(whole.parent.resolve() / whole.name)


def _sniffed(data: bytes) -> str:
    first = data.lstrip()[:1]
    if first == b"{":
        return ".json"
    # A msgpack map: fixmap, map 16 or map 32. None of these bytes begins UTF-8 text.
    return ".msgpack" if first and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF)) else ".toml"


def _toml(data: bytes) -> object:
    return tomllib.loads(data.decode())


def _json(data: bytes) -> object:
    return msgspec.json.decode(data)


def _msgpack(data: bytes) -> object:
    return msgspec.msgpack.decode(data)


_DECODERS: Final[dict[str, Callable[[bytes], object]]] = {".toml": _toml, ".json": _json, ".msgpack": _msgpack}
