"""Check that the docstring of every function begins with a verb: `python -m tests.docstrings`, which `make lint` calls.

A docstring that begins with a noun says what a thing is; one that begins with a verb says what calling it does. Properties are
things, so they are left out, and so are classes, modules and attributes.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("model", "registry", "ota", "flows", "tests")
# Verbs in use, in the imperative. A word that is missing here is added, if it is a verb where it stands.
VERBS = frozenset(
    """
    Accept Add Allow Apply Approve Arrange Ask Assign Average Boot Bring Build Cache Call Change Check Choose Clip Close Collect
    Combine Commit Compare Complete Compress Compute Condemn Convert Copy Count Cover Create Cut Damage Darken Deal Decide
    Decode Decompress Define Delete Deliver Derive Describe Detect Distil Divide Do Download Draw Drop Encode End Enlarge
    Enrol Estimate Evaluate Export Fail Fetch Fill Find Finish Fit Follow Forecast Forget Format Generate Give Group Halt Hash
    Hide Hold Ignore Install Integrate Join Judge Keep Kill Leave Let Lift Link List Listen Load Lock Log Look Lose Make Map
    Mark Match Measure Move Multiply Name Normalise Note Offer Open Order Overwrite Pack Parse Pass Plan Play Plot Point Poll
    Predict Prepare Print Promote Protect Provide Publish Put Quantise Read Rebuild Receive Record Refuse Register Release
    Remove Rename Render Renew Renumber Repeat Replace Report Reset Resolve Restore Retrain Retry Return Roll Rotate Round Run
    Say Seal See Seed Select Send Serialise Serve Set Shorten Show Sign Simulate Skip Split Start Stop Store Subtract Sum
    Summarise Suspend Take Tell Test Trace Train Transform Translate Treat Try Turn Undo Unpack Update Upload Verify Wait Walk
    Weigh Wrap Write Yield
    """.split()  # noqa: SIM905 - a page of words is easier to read than a list of strings
)


def first_word(node: ast.AST) -> str | None:
    """Return the first word of a function's docstring; None where it has none, for properties and for all that is no function."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    text = ast.get_docstring(node)
    if not text or any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    return text.split()[0].rstrip(".,:;")


def problems(root: Path) -> Iterator[str]:
    """Yield a line for each docstring that does not begin with a verb."""
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            word = first_word(node)
            if word is not None and word not in VERBS:
                name, line = getattr(node, "name", ""), getattr(node, "lineno", 0)
                yield f"{path.relative_to(root)}:{line}: the docstring of {name} begins with {word!r}; begin it with a verb (VERBS in tests/docstrings.py)"


def main() -> None:
    """Print what is wrong; exit code 1 if something is."""
    found = list(problems(Path(__file__).parent.parent))
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
