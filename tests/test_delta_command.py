"""`ferry-delta` is `ferry delta` in a small wheel: the same arguments, answers, exit codes and files over the same inputs."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.numpy import save
from typer.testing import CliRunner

import ota
from flows.cli import app
from flows.cli.delta import delta_app
from ota.delta import cli, commands, files, picture
from ota.delta.files import Part
from ota.errors import OperatorError, exit_codes
from tests.conftest import Told, commands_of
from tests.test_delta_files import STEP, WEIGHTS, full, model

ROOT = Path(__file__).parent.parent
PROGRAMS = {"ferry delta": [sys.executable, "-m", "flows.cli", "delta"], "ferry-delta": [sys.executable, "-m", "ota.delta.cli"]}


def ferry_delta(*words: str) -> Told:
    """Run `ferry-delta` in this process and return its output and exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.call(list(words))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Told(code, out.getvalue(), err.getvalue())


def ferry(*words: str) -> Told:
    result = CliRunner().invoke(app, ["delta", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Told(result.exit_code, result.stdout, result.stderr)


def inputs(folder: Path) -> Path:
    """Write the files that the commands below name."""
    folder.mkdir()
    (folder / "old.onnx").write_bytes(model({"first": full(WEIGHTS), "second": full(WEIGHTS[:100])}))
    (folder / "new.onnx").write_bytes(model({"first": full(WEIGHTS + STEP), "second": full(WEIGHTS[:100])}))
    (folder / "old.safetensors").write_bytes(save({"w": WEIGHTS}))
    (folder / "new.safetensors").write_bytes(save({"w": WEIGHTS + STEP}))
    for name, values in (("old", WEIGHTS), ("new", WEIGHTS + STEP)):
        (folder / f"{name}.bin").write_bytes(values.tobytes())
        (folder / f"{name}-graph.onnx").write_bytes(model({"w": full(values)}, external=f"{name}.bin"))
    steps = {"w.steps": np.ones(WEIGHTS.size, np.int32)}
    (folder / "factors").write_bytes(
        save(steps, {"deltaferry": '{"schema_version": 1, "products": {}, "steps": {"w": "0x1p-8"}}'})
    )
    (folder / "empty").write_bytes(b"")
    (folder / "a\nb \x1b[2J").write_bytes(b"a name that could rewrite a terminal" * 9)
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("old.onnx")
    os.mkfifo(folder / "pipe")
    files.build(folder / "old.onnx", folder / "new.onnx", folder / "patch")
    files.build(folder / "old.safetensors", folder / "new.safetensors", folder / "patch.safetensors")
    (folder / "damaged").write_bytes((folder / "patch").read_bytes()[:-3] + b"xyz")
    return folder


def content(folder: Path) -> dict[str, Any]:
    kinds = {path.name: path for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    return {name: path.read_bytes() for name, path in sorted(kinds.items())}


CALLS = [
    "build old.onnx new.onnx -o p", "build old.onnx new.onnx --output=p --json", "build -o p old.onnx --json new.onnx", "build empty new.onnx -o p",
    "build old.onnx empty -o p", "build old.bin new.bin -o p --graph new-graph.onnx --old-graph old-graph.onnx", "build old.bin new.bin -o p",
    "build old.bin new.bin -o p --graph new.onnx", "build 'a\nb \x1b[2J' old.onnx -o 'c\nd' --json", "build 'a\nb \x1b[2J' old.onnx -o 'c\nd'",
    "build old.onnx new.onnx -o old.onnx", "build old.onnx new.onnx -o link", "build old.onnx new.onnx -o folder", "build old.onnx new.onnx -o nowhere/p",
    "build old.safetensors new.safetensors -o p --factors factors --json", "build old.safetensors new.safetensors -o p --factors empty",
    "build old.safetensors new.safetensors -o factors --factors factors", "build old.safetensors new.safetensors -o p --factors nowhere",
    "build pipe new.onnx -o p", "build nowhere new.onnx -o p", "build folder new.onnx -o p", "build -- old.onnx new.onnx",
    "apply old.onnx patch -o again", "apply new.onnx patch -o again", "apply old.onnx damaged -o again", "apply old.onnx new.onnx -o again",
    "apply old.onnx patch --output patch", "apply old.onnx nowhere -o again", "apply old.onnx patch -o again --json",
    "inspect patch", "inspect patch --json", "inspect patch --of new.onnx", "inspect patch --of new.onnx --from old.onnx",
    "inspect patch --of new.onnx --from old.onnx --json --plot p.svg", "inspect patch --plot p.svg", "inspect patch.safetensors --of new.safetensors",
    "inspect patch --from new.onnx", "inspect patch --plot p.jpeg", "inspect patch --plot old.svg/p.svg", "inspect new.onnx", "inspect nowhere",
    "inspect patch --of nowhere", "inspect patch --of new.onnx --graph old-graph.onnx",
    "estimate old.onnx new.onnx", "estimate old.onnx new.onnx --json", "estimate empty empty", "estimate old.onnx empty --json", "estimate nowhere new.onnx",
    "estimate old.bin new.bin --graph new-graph.onnx --json",
    "estimate old.safetensors new.safetensors --factors factors --json", "estimate old.safetensors new.safetensors --factors pipe",
    # Wrong usage; there the wording is that of the library which parses the arguments.
    "", "build", "build old.onnx", "build old.onnx new.onnx", "build - new.onnx -o p", "build '' new.onnx -o p", "build old.onnx new.onnx -o -",
    "build old.onnx new.onnx -o p --gra new-graph.onnx", "build old.onnx new.onnx other -o p", "estimate old.onnx new.onnx -o p", "nothing", "--nothing",
    "inspect patch --from", "inspect patch --plot -",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return inputs(folder / "a"), inputs(folder / "b")


@pytest.mark.parametrize("call", CALLS)
def test_both_programs_do_and_say_the_same(folders, monkeypatch, call):
    told, left = [], []
    for program, folder in zip((ferry, ferry_delta), folders, strict=True):
        monkeypatch.chdir(folder)
        before = content(folder)
        told.append(program(*shlex.split(call)))
        left.append(content(folder))
        for name in left[-1].keys() - before.keys():
            (folder / name).unlink()
        for name, data in before.items():
            (folder / name).write_bytes(data)
    assert told[0].exit_code == told[1].exit_code
    assert told[0].stdout == told[1].stdout
    assert left[0] == left[1]
    assert told[0].exit_code in (0, 2, 3)
    if told[0].exit_code == 3:
        assert told[1].stderr == told[0].stderr.replace("ferry: ", "ferry-delta: ", 1)
    if told[0].exit_code == 2:
        assert told[1].stderr


def test_calls_try_every_option_and_code():
    tried = " ".join(CALLS)
    for name, parser in commands_of(cli.parser()).items():
        assert name in tried
        for option in {o for action in parser._actions for o in action.option_strings} - {"-h", "--help"}:
            assert option in tried, option


def test_both_programs_have_the_same_commands_options_and_help():
    group: Any = typer.main.get_command(delta_app)
    small = commands_of(cli.parser())
    assert list(group.commands) == list(small) == list(commands.HELP)
    for name, command in group.commands.items():
        assert small[name].description == command.help
        wanted = {option: parameter.help for parameter in command.params for option in parameter.opts if option.startswith("-")}
        given = {option: action.help for action in small[name]._actions for option in action.option_strings}
        assert {option: text for option, text in given.items() if option not in ("-h", "--help")} == wanted
        positional = [(action.dest, action.help) for action in small[name]._actions if not action.option_strings]
        assert positional == [(p.name, p.help) for p in command.params if p.param_type_name == "argument"]


def test_full_disk_closed_output_and_reader_that_left_end_alike(folders):
    told: dict[str, list[Any]] = {}
    for program, words in PROGRAMS.items():
        at = told.setdefault(program, [])
        with Path("/dev/full").open("wb") as full_disk:
            at.append(subprocess.run([*words, "inspect", "patch"], cwd=folders[0], stdout=full_disk, stderr=subprocess.PIPE))
        reading, writing = os.pipe()
        os.close(reading)
        at.append(subprocess.run([*words, "inspect", "patch"], cwd=folders[0], stdout=writing, stderr=subprocess.PIPE))
        os.close(writing)
        closed = shlex.join([*words, "inspect", "patch"]) + " >&-"
        at.append(subprocess.run(closed, cwd=folders[0], shell=True, stderr=subprocess.PIPE))
    ferrys, small = ([(done.returncode, done.stderr.decode()) for done in told[name]] for name in PROGRAMS)
    assert small == [(code, text.replace("ferry: ", "ferry-delta: ")) for code, text in ferrys]
    assert [code for code, _ in small] == [3, 3, 0]


def test_interrupt_says_what_to_do(folders, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(folders[0])
    monkeypatch.setattr(files, "forecast", interrupt)
    both = [program("estimate", "old.onnx", "new.onnx") for program in (ferry, ferry_delta)]
    assert [told.exit_code for told in both] == [130, 130]
    assert both[1].stderr == both[0].stderr.replace("ferry: ", "ferry-delta: ")
    assert "interrupted; nothing was written, repeat the command to begin again" in both[1].stderr


def test_version_debug_and_help(folders):
    assert ferry_delta("--version").stdout == f"ferry-delta {ota.__version__}\n"
    with pytest.raises(OperatorError):
        ferry_delta("--debug", "inspect", str(folders[0] / "nowhere"))
    told = ferry_delta("--help")
    assert (told.exit_code, told.stderr) == (0, "")
    assert "130 interrupted" in " ".join(told.stdout.split())


def test_help_and_the_first_import_load_no_library():
    """Load NumPy only in a command: with it, `--help` would take three times as long, and OpenBLAS would have its threads."""
    code = "import sys, ota.delta.cli as c; c.parser().format_help(); print(*(m for m in ('numpy', 'bsdiff4', 'backports') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_readme_shows_commands_exit_codes_and_figures_that_hold():
    text = (ROOT / "ota" / "delta" / "README.md").read_text()
    shown = re.findall(r"^\$ ferry-delta ([^#\n]+)", text, re.MULTILINE)
    assert {cli.parser().parse_args(shlex.split(words)).does.__name__ for words in shown} == set(commands.HELP)
    assert exit_codes("ferry-delta").rstrip(".") in text
    table = (ROOT / "tests" / "bench" / "results" / "delta.md").read_text()
    (pairs,) = re.findall(r"on \d+ of (\d+) pairs", table)
    (new, bsdiff) = re.findall(r"\*\*geometric mean, all\*\* \| ([\d.]+) \| ([\d.]+) ", table)[0]
    said = f"On {pairs} pairs of model files, the delta is {float(new):.1f} times smaller than the new file, and {float(bsdiff):.1f} times smaller"
    assert said in " ".join(text.split())


def modules_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_codec_imports_nothing_else():
    """Read what each file of the small wheel imports; the import contract cannot list all that is not allowed."""
    found = {path.name: set(modules_of(path)) for path in (ROOT / "ota" / "delta").glob("*.py")}
    found |= {name: set(modules_of(ROOT / "ota" / name)) for name in ("__init__.py", "errors.py", "limits.py", "output.py")}
    assert len(found) > 15
    for name, modules in found.items():
        for module in modules:
            top = module.split(".")[0]
            ours = (
                module.startswith(("ota.delta", "ota.errors", "ota.limits", "ota.output", "ota.__version__")) or module == "ota"
            )
            known = top in sys.stdlib_module_names or top in ("numpy", "bsdiff4") or module.startswith("backports.zstd") or ours
            assert known or (name, top) == ("picture.py", "matplotlib"), f"{name} imports {module}"


# The picture


def part(tensors: list[str], length: int = 4000, size: float = 100.0, holds: str = "float32") -> Part:
    return Part("numbers", 0, length, size, {holds: length // 4}, 1, tensors)


def texts(svg: bytes) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg) if node.tag.endswith("text")]


def test_picture_shows_names_that_could_break_it(tmp_path):
    hostile = ["</text><script>alert(1)</script>", "a & b \"c\" 'd'", "\x00\x1b[2J\ud800\u202e", "x" * 3000, "$\\frac{1}$"]
    picture.draw([part([name], size=900.0 - i) for i, name in enumerate(hostile)], tmp_path / "p.svg")
    shown = texts((tmp_path / "p.svg").read_bytes())
    assert {hostile[0], hostile[1], r"\x00\x1b[2J\ud800\u202e", hostile[4]} <= set(shown)
    assert max(map(len, shown)) <= picture.LONGEST
    picture.draw([part([name]) for name in hostile], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    picture.draw([part([name]) for name in hostile], tmp_path / "p.pdf")
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")


def test_picture_is_the_same_each_time_and_stays_in_its_frame(tmp_path):
    rng = np.random.default_rng(0)
    parts, at = [], 0
    for i in range(300):
        length = int(rng.integers(1, 50_000))
        parts.append(Part("numbers", at, length, float(rng.exponential(length)), {f"kind {i % 7}": 1}, 1, [f"tensor {i}"]))
        at += length
    for name in ("a", "b"):
        picture.draw(parts, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    shapes = picture.layout(parts)
    for shape in shapes:
        assert 0 <= shape.x <= picture.WIDTH
        assert 0 <= shape.y <= picture.HEIGHT
        if isinstance(shape, picture.Box):
            assert shape.x + shape.width <= picture.WIDTH
            assert shape.y + shape.height <= picture.BOTTOM + 100
            assert shape.height >= 0
    assert len([s for s in shapes if isinstance(s, picture.Text) and s.text.startswith("tensor ")]) == picture.MOST


def test_heights_and_lengths_are_to_scale():
    cheap, dear = part(["a"], 1000, 100.0), Part("numbers", 1000, 3000, 600.0, {"float32": 750}, 1, ["b"])
    boxes = [s for s in picture.layout([cheap, dear]) if isinstance(s, picture.Box) and s.colour == picture.COLOURS[0]][:2]
    assert boxes[1].height == pytest.approx(2 * boxes[0].height)  # 20 % of its bytes beside 10 %
    assert boxes[1].width == pytest.approx(3 * boxes[0].width)
    assert boxes[1].x == pytest.approx(boxes[0].x + boxes[0].width)
    bars = [s for s in picture.layout([cheap, dear]) if isinstance(s, picture.Box) and s.colour == picture.GREY]
    assert bars[0].width == pytest.approx(6 * bars[1].width)


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(OperatorError, match="makes no bytes"):
        picture.draw([], tmp_path / "p.svg")
    assert list(tmp_path.iterdir()) == []


def test_png_without_matplotlib_says_what_to_do_before_any_work(folders, monkeypatch):
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda _: None)
    monkeypatch.chdir(folders[0])
    told = ferry_delta("inspect", "patch", "--plot", "p.png")
    assert told.exit_code == 3
    assert told.stderr == (
        "ferry-delta: a .png file needs matplotlib, which is not installed; install it, or name a file that ends in .svg\n"
    )
    assert not Path("p.png").exists()
    assert ferry_delta("inspect", "patch", "--plot", "p.svg").exit_code == 0
    Path("p.svg").unlink()
