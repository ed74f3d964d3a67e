"""Record what a process does to a folder, and replay every state that a power cut can leave of that folder.

The simulated disk keeps only what POSIX promises, which is less than any journalling file system keeps. Of a file that was
not synced, any part of what was written since the last sync may be there, as data, as zeros, or not at all. Of a folder that
was not synced, each change of its names may be there or not, independently of the others. A rename between folders may
therefore appear in both folders or in neither. If only the process is killed, nothing is lost, but pending changes stay
pending for the process that starts next.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MAX_STATES = 512
"""Of one moment. If more are possible, only those are made in which one node differs from all done or from all lost."""

Content = bytes | str | None
"""The bytes of a file, the target of a symbolic link, or None for a folder."""
State = dict[str, Content]
"""What is left, by path; folders come before their contents."""


# The model of a disk


@dataclass
class File:
    data: bytes = b""
    synced: bytes = b""

    def options(self) -> list[bytes]:
        """List the contents that a power cut may leave of the file."""
        if self.data == self.synced:
            return [self.data]
        kept = len(self.synced) if self.data.startswith(self.synced) else 0
        half, zeros = kept + (len(self.data) - kept + 1) // 2, bytes(len(self.data) - kept)
        torn = [self.data[:kept], self.data[:half], self.data[:kept] + zeros, self.data[:half] + bytes(len(self.data) - half)]
        return list(dict.fromkeys([self.data, self.synced, *torn]))


@dataclass
class Link:
    to: str


Edit = dict[str, int | None]
"""One change of a folder's names: each name leads to the number of a node, or to None if it is removed."""


@dataclass
class Folder:
    names: dict[str, int] = field(default_factory=dict)
    synced: dict[str, int] = field(default_factory=dict)
    pending: list[Edit] = field(default_factory=list)

    def change(self, edit: Edit) -> None:
        self.names = changed(self.names, [edit])
        self.pending.append(edit)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.names), []

    def options(self) -> list[dict[str, int]]:
        """List the names that a power cut may leave, with each pending change done or lost.

        Of more than five pending changes, only some combinations: the first n done (from none to all), one done, all but one.
        """
        n = len(self.pending)
        chosen: list[tuple[bool, ...]]
        if n <= 5:
            chosen = list(itertools.product((True, False), repeat=n))
        else:
            first = [tuple(i < m for i in range(n)) for m in range(n + 1)]
            single = [tuple((i == m) is one for i in range(n)) for m in range(n) for one in (True, False)]
            chosen = [*reversed(first), *single]
        return [changed(self.synced, list(itertools.compress(self.pending, done))) for done in chosen]


def changed(names: dict[str, int], edits: list[Edit]) -> dict[str, int]:
    found: dict[str, int | None] = dict(names)
    for edit in edits:
        found |= edit
    return {name: node for name, node in found.items() if node is not None}


Op = tuple[Any, ...]
"""The kind of an operation (the name of a method of `Tree`) and its arguments."""


class Tree:
    """A simulated disk: nodes by number, 0 the root. Each kind of operation on the disk is a method."""

    def __init__(self) -> None:
        self.nodes: list[File | Link | Folder] = [Folder()]

    @classmethod
    def of(cls, root: Path) -> Tree:
        """Read a folder; all of it counts as durable."""
        tree = cls()
        for path in sorted(root.rglob("*")):
            parent, name = tree.find(path.parent.relative_to(root).parts), path.name
            assert parent is not None
            if path.is_symlink():
                tree.make(parent, name, Link(str(path.readlink())))
            elif path.is_dir():
                tree.make(parent, name, Folder())
            else:
                tree.make(parent, name, File())
                tree.write(len(tree.nodes) - 1, path.read_bytes())
        for number, node in enumerate(tree.nodes):
            if not isinstance(node, Link):
                tree.sync(number)
        return tree

    def folder(self, number: int) -> Folder:
        node = self.nodes[number]
        assert isinstance(node, Folder)
        return node

    def file(self, number: int) -> File:
        node = self.nodes[number]
        assert isinstance(node, File)
        return node

    def find(self, parts: tuple[str, ...]) -> int | None:
        """Return the number of the node at a path, or None if there is none; links are not followed."""
        at = 0
        for part in parts:
            node = self.nodes[at]
            if not isinstance(node, Folder) or part not in node.names:
                return None
            at = node.names[part]
        return at

    def make(self, folder: int, name: str, node: File | Link | Folder) -> None:
        self.nodes.append(copy.deepcopy(node))
        self.folder(folder).change({name: len(self.nodes) - 1})

    def write(self, number: int, data: bytes) -> None:
        self.file(number).data = data

    def sync(self, number: int) -> None:
        node = self.nodes[number]
        if isinstance(node, Folder):
            node.sync()
        elif isinstance(node, File):
            node.synced = node.data

    def move(self, folder: int, name: str, to: int, new: str) -> None:
        number = self.folder(folder).names[name]
        if folder == to:
            self.folder(folder).change({name: None, new: number})
        else:
            self.folder(to).change({new: number})
            self.folder(folder).change({name: None})

    def remove(self, folder: int, name: str) -> None:
        self.folder(folder).change({name: None})

    def note(self, kind: str, value: Any) -> None:
        """Do nothing to the disk; see `Log.notes`."""

    # What is left of it

    def current(self) -> State:
        """Return what a running process sees."""
        return dict(self._walk(0, "", self._now))

    def _now(self, number: int) -> Any:
        node = self.nodes[number]
        return node.names if isinstance(node, Folder) else node.data if isinstance(node, File) else node.to

    def _walk(self, number: int, place: str, chosen: Callable[[int], Any]) -> Iterator[tuple[str, Content]]:
        found = chosen(number)
        if not isinstance(self.nodes[number], Folder):
            yield place, found
            return
        if place:
            yield place, None
        for name, below in sorted(found.items()):
            yield from self._walk(below, f"{place}/{name}" if place else name, chosen)

    def states(self, loose: str) -> Iterator[State]:
        """Yield all states that a power cut may leave now.

        Args:
            loose: name of a folder at the top that is never synced, because it may be lost at any moment. Its own states are:
                as it is, lost, and all files torn. They are combined only with two states of the rest: all done and all lost.
        """
        below = self._below(self.folder(0).names.get(loose))
        open_ones = {number: options for number in range(len(self.nodes)) if number not in below
                     if len(options := self._options(number)) > 1}  # fmt: skip
        loose_ones = [{}, *self._loosely(below)]
        for i, choice in enumerate(combined(open_ones)):
            for loosely in loose_ones if i < 2 else loose_ones[:1]:
                picked = choice | loosely
                yield dict(self._walk(0, "", lambda number, picked=picked: picked.get(number, self._now(number))))  # type: ignore[misc]

    def _options(self, number: int) -> list[Any]:
        node = self.nodes[number]
        return [] if isinstance(node, Link) else list(node.options())

    def _below(self, number: int | None) -> set[int]:
        if number is None:
            return set()
        node = self.nodes[number]
        inside = {i for edit in (node.names, node.synced, *node.pending) for i in edit.values() if i is not None} \
            if isinstance(node, Folder) else set()  # fmt: skip
        return {number}.union(*(self._below(i) for i in inside))

    def _loosely(self, below: set[int]) -> list[dict[int, Any]]:
        folders = {i: self.folder(i).synced for i in below if isinstance(self.nodes[i], Folder)}
        files = {i: self.file(i) for i in below if isinstance(self.nodes[i], File)}
        torn = {i: file.data[: len(file.data) // 2] for i, file in files.items() if file.data != file.synced}
        return [folders | {i: file.synced for i, file in files.items()}, torn] if below else []


def combined(options: dict[int, list[Any]]) -> Iterator[dict[int, Any]]:
    """Yield combinations of one option for each node; all done and all lost come first."""
    done = {number: found[0] for number, found in options.items()}
    lost = {number: found[-1] for number, found in options.items()}
    yield done
    yield lost
    count = 1
    for found in options.values():
        count *= len(found)
    if count <= MAX_STATES:
        for choice in itertools.product(*options.values()):
            yield dict(zip(options, choice, strict=True))
    else:
        for number, found in options.items():
            for option in found:
                yield done | {number: option}
                yield lost | {number: option}


def fingerprint(state: State) -> int:
    """Hash a state to tell it from others; states share contents, and Python computes the hash of each content once."""
    return hash(tuple(state.items()))


def lay_out(state: State, root: Path) -> None:
    """Create a folder with the contents of a state."""
    root.mkdir(parents=True)
    for place, content in state.items():
        path = root / place
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


# What was done


@dataclass
class Log:
    """What a process did to a folder, in order."""

    before: Tree
    ops: list[Op] = field(default_factory=list)

    def after(self, count: int) -> Tree:
        """Return the disk after the first `count` operations."""
        tree = copy.deepcopy(self.before)
        for kind, *arguments in self.ops[:count]:
            getattr(tree, kind)(*arguments)
        return tree

    def notes(self, count: int) -> Iterator[tuple[str, Any]]:
        """Return what was promised or begun within the first `count` operations."""
        return ((op[1], op[2]) for op in self.ops[:count] if op[0] == "note")

    def states(self, loose: str, first: int = 0, last: int | None = None) -> Iterator[tuple[int, State]]:
        """Yield all states of all moments, each with the number of operations that were done before the cut."""
        tree = self.after(first)
        end = len(self.ops) if last is None else last
        for count in range(first, end + 1):
            for state in tree.states(loose):
                yield count, state
            if count < end:
                kind, *arguments = self.ops[count]
                getattr(tree, kind)(*arguments)

    def without(self, index: int) -> Log:
        """Return a copy of the log with one operation left out."""
        return Log(self.before, [*self.ops[:index], ("note", "left out", None), *self.ops[index + 1 :]])

    def syncs(self) -> list[int]:
        """Return the indices of the operations that made something durable."""
        return [i for i, op in enumerate(self.ops) if op[0] == "sync"]


class Recorder:
    """Records what this process does below a folder, by wrapping the calls of `os` that do it."""

    def __init__(self, root: Path, before: Tree) -> None:
        self.root, self.log, self.tree = root.resolve(), Log(copy.deepcopy(before)), copy.deepcopy(before)
        self._written: set[int] = set()

    def did(self, kind: str, *arguments: Any) -> None:
        """Record an operation that was just done, after `look` before it."""
        self.log.ops.append((kind, *arguments))
        getattr(self.tree, kind)(*arguments)

    def look(self) -> None:
        """Record what was written to files since the last look."""
        places = {number: place for place, number in self._places(0, "")} if self._written else {}
        for number in sorted(self._written):
            if number not in places:
                self._written.discard(number)
                continue
            data = (self.root / places[number]).read_bytes()
            if data != self.tree.file(number).data:
                self.log.ops.append(("write", number, data))
                self.tree.write(number, data)

    def _places(self, number: int, place: str) -> Iterator[tuple[str, int]]:
        node = self.tree.nodes[number]
        if isinstance(node, Folder):
            for name, below in node.names.items():
                yield from self._places(below, f"{place}/{name}" if place else name)
        else:
            yield place, number

    def parts(self, path: Any, dir_fd: int | None = None) -> tuple[str, ...] | None:
        """Return the parts of a path below the folder, or None for a path outside it."""
        start = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        found = os.path.normpath(start / os.fsdecode(path))
        if found != str(self.root) and not found.startswith(f"{self.root}/"):
            return None
        return Path(found).relative_to(self.root).parts

    def place(self, parts: tuple[str, ...]) -> tuple[int, str]:
        """Return the number of the folder that holds a path, and the name of the path in it."""
        folder = self.tree.find(parts[:-1])
        assert folder is not None, parts
        return folder, parts[-1]

    def check(self) -> None:
        """Check that nothing was done to the folder without being recorded."""
        self.look()
        assert fingerprint(Tree.of(self.root).current()) == fingerprint(self.tree.current())

    @contextmanager
    def watching(self, patch: pytest.MonkeyPatch) -> Iterator[Log]:
        """Record what happens inside the `with` block."""
        real = {name: getattr(os, name) for name in ("open", "replace", "rename", "mkdir", "unlink", "rmdir", "symlink", "fsync")}

        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            self.look()
            descriptor: int = real["open"](path, flags, mode, dir_fd=dir_fd)
            parts = self.parts(path, dir_fd) if flags & (os.O_WRONLY | os.O_RDWR) else None
            if parts is not None:
                number = self.tree.find(parts)
                if number is None:
                    self.did("make", *self.place(parts), File())
                    number = len(self.tree.nodes) - 1
                elif flags & os.O_TRUNC:
                    self.did("write", number, b"")
                self._written.add(number)
            return descriptor

        def moved(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            self.look()
            real["replace"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if (parts := self.parts(source, src_dir_fd)) is not None and (to := self.parts(target, dst_dir_fd)) is not None:
                self.did("move", *self.place(parts), *self.place(to))

        def removed(path: Any, *, dir_fd: int | None = None, _call: str = "unlink") -> None:
            self.look()
            parts = self.parts(path, dir_fd)
            real[_call](path, dir_fd=dir_fd)
            if parts is not None:
                self.did("remove", *self.place(parts))

        def made(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            self.look()
            real["mkdir"](path, mode, dir_fd=dir_fd)
            if (parts := self.parts(path, dir_fd)) is not None:
                self.did("make", *self.place(parts), Folder())

        def linked(target: Any, path: Any, **_: Any) -> None:
            self.look()
            real["symlink"](target, path)
            if (parts := self.parts(path)) is not None:
                self.did("make", *self.place(parts), Link(os.fsdecode(target)))

        def synced(descriptor: int) -> None:
            self.look()
            real["fsync"](descriptor)
            parts = self.parts(Path(f"/proc/self/fd/{descriptor}").readlink())
            number = None if parts is None else self.tree.find(parts)
            if number is not None:
                self.did("sync", number)
                self._written.discard(number)

        with patch.context() as inner:
            inner.setattr(os, "open", opened)
            inner.setattr(os, "replace", moved)
            inner.setattr(os, "rename", moved)
            inner.setattr(os, "mkdir", made)
            inner.setattr(os, "unlink", removed)
            inner.setattr(os, "remove", removed)
            inner.setattr(os, "rmdir", lambda path, *, dir_fd=None: removed(path, dir_fd=dir_fd, _call="rmdir"))
            inner.setattr(os, "symlink", linked)
            inner.setattr(os, "fsync", synced)
            yield self.log
        self.check()
