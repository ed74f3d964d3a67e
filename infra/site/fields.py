"""An extension of Griffe: the API pages list a pydantic model's fields with their descriptions, in one table for each class."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Class, ExprCall, ExprKeyword, Extension


class Fields(Extension):
    """Adds a section "Attributes" to the docstring of a class whose fields have a description."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Add the section to one class."""
        rows = [(member, text) for member in cls.members.values() if isinstance(member, Attribute) and (text := _meaning(member))]
        if rows and cls.docstring:
            lines = "\n".join(f"    {member.name} ({member.annotation}): {text}" for member, text in rows)
            cls.docstring.value += f"\n\nAttributes:\n{lines}\n"


def _meaning(member: Attribute) -> str:
    """Return the description that a field is given in the source; "": there is none."""
    if not isinstance(member.value, ExprCall) or str(member.value.function) != "Field":
        return ""
    for argument in member.value.arguments:
        if isinstance(argument, ExprKeyword) and argument.name == "description" and isinstance(argument.value, str):
            return str(ast.literal_eval(argument.value)).replace("[", "\\[")  # otherwise it would be a reference
    return ""
