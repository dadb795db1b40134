"""The words around a magic: variables, quotes and comments, help by `?`, values of discarded lines, completion.

Pure where it can be; nothing here knows a command.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import UsageError

_BRACES = re.compile(r"\{([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\}")
_DOLLAR = re.compile(r"\$([A-Za-z_]\w*)")


def expand(line: str, names: Mapping[str, Any]) -> str:
    """`{name}`, `{name.attribute}` and `$name` replaced by the notebook's values; ends before a comment (` # …`).

    Only whole identifiers that exist, only outside single quotes, and never `{{…}}` (a template) or `${…}`. The value
    is quoted, so it is always one word (a list: one word for each item) wherever it stands.
    """
    out: list[str] = []
    quote = ""
    index = 0
    while index < len(line):
        char = line[index]
        if char == "\\" and quote != "'":
            out.append(line[index : index + 2])
            index += 2
            continue
        if char in "'\"" and quote in ("", char):
            quote = "" if quote else char
        elif char == "#" and not quote and (index == 0 or line[index - 1].isspace()):
            break
        elif quote != "'":
            text, length = _value_at(line, index, names, quoted=bool(quote))
            if length:
                out.append(text)
                index += length
                continue
        out.append(char)
        index += 1
    return "".join(out)


def _value_at(line: str, index: int, names: Mapping[str, Any], *, quoted: bool) -> tuple[str, int]:
    """(replacement, length of what it replaces) at one place of the line; length 0 for nothing to replace."""
    if line.startswith("{{", index):
        # A template is copied as a whole: `{{.Names}}` has nothing of ours in it.
        end = line.find("}}", index)
        end = len(line) if end < 0 else end + 2
        return line[index:end], end - index
    before = line[index - 1] if index else ""
    match = None if before == "$" else _BRACES.match(line, index)
    match = match or _DOLLAR.match(line, index)
    if match is None:
        return "", 0
    first, *attributes = match.group(1).split(".")
    if first not in names:
        return "", 0
    value = names[first]
    for attribute in attributes:
        if not hasattr(value, attribute):
            return "", 0
        value = getattr(value, attribute)
    return _words_of(value, quoted=quoted), match.end() - match.start()


def _words_of(value: Any, *, quoted: bool) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        texts = [_word_of(item) for item in value]
    else:
        texts = [_word_of(value)]
    if quoted:
        return " ".join(re.sub(r'(["\\])', r"\\\1", text) for text in texts)
    return " ".join(shlex.quote(text) for text in texts)


def _word_of(value: Any) -> str:
    """Our objects stand for themselves by id or name; anything else is its text."""
    if not isinstance(value, (str, bytes, int, float)) and type(value).__module__.startswith("labkernel"):
        for name in ("image", "id", "name"):
            found = getattr(value, name, None)
            if name == "image":
                found = getattr(found, "id", None) if type(value).__name__ == "BuildResult" else None
            if isinstance(found, str):
                return found
    return str(value)


def split(line: str) -> tuple[list[str], bool]:
    """(words as a POSIX shell splits them, whether the line ended with `;`). Raises UsageError for an open quote."""
    silent = False
    try:
        words = shlex.split(line)
    except ValueError as err:
        raise UsageError(f"{err}: {line.strip()}".replace("No closing", "no closing")) from None
    bare = line.rstrip()
    if bare.endswith(";") and words and words[-1].endswith(";"):
        silent = True
        words[-1] = words[-1][:-1]
        if not words[-1]:
            words.pop()
    return words, silent


class HelpLines:
    """Input transformer: `%container run?` shows our help; without it IPython shows the help of its own `%run`."""

    def __init__(self, magics: Sequence[str], known: Callable[[str, list[str]], bool]) -> None:
        self._line = re.compile(rf"^(\s*)%({'|'.join(magics)})\s+(\S.*?)\s*(\?{{1,2}})\s*$")
        self._known = known

    def __call__(self, lines: list[str]) -> list[str]:
        if not lines or lines[0].lstrip().startswith("%%"):
            return lines
        return [self._rewrite(line) if "?" in line and "%" in line else line for line in lines]

    def _rewrite(self, line: str) -> str:
        match = self._line.match(line.rstrip("\n"))
        if match is None:
            return line
        indent, name, words, marks = match.groups()
        # Otherwise the question mark belongs to the command (`echo what?`), and IPython must not take it.
        asked = self._known(name, words.split())
        rest = f"{words} --help" if asked else f"{words}{marks}"
        return f"{indent}get_ipython().run_line_magic({name!r}, {rest!r})\n"


def show(value: Any) -> None:
    """Display the value of a magic whose line is not the last of its cell."""
    from IPython.display import display

    if value is not None:
        display(value)  # type: ignore[no-untyped-call]


class ShowDiscarded(ast.NodeTransformer):
    """AST transformer: a magic's line displays its value also where Python would drop it (not last, in a loop)."""

    def __init__(self, magics: Sequence[str]) -> None:
        self._magics = frozenset(magics)
        self._last: ast.stmt | None = None

    def visit_Module(self, node: ast.Module) -> ast.AST:
        self._last = node.body[-1] if node.body else None
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if node is self._last or not self._is_ours(node.value):
            return node
        shown = ast.parse("__import__('labkernel.commands.cells', fromlist=['show']).show(None)", mode="eval").body
        assert isinstance(shown, ast.Call)
        shown.args = [node.value]
        return ast.copy_location(ast.fix_missing_locations(ast.copy_location(ast.Expr(shown), node)), node)

    def _is_ours(self, call: ast.expr) -> bool:
        return (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "run_line_magic"
            and bool(call.args)
            and isinstance(call.args[0], ast.Constant)
            and call.args[0].value in self._magics
        )


# -- completion


def command_matcher(roots: Mapping[str, Any], host_for: Callable[[str], Any]) -> Any:
    """A matcher for IPython's completer: commands, flags and names after our magics, instructions in %%dockerfile.

    It answers for the whole line and silences the other matchers, since Jedi takes seconds for its first answer and
    knows nothing of a Dockerfile.
    """
    from IPython.core.completer import SimpleCompletion, context_matcher

    magic = re.compile(rf"^\s*(?:[A-Za-z_]\w*\s*=\s*)?%({'|'.join(roots)})\s+(.*)$")

    # The API version is checked by IPython; a priority above Jedi's lets ours run first.
    @context_matcher(priority=2000, identifier="labkernel")  # type: ignore[untyped-decorator]
    def labkernel_matcher(context: Any) -> Any:
        before = context.line_with_cursor[: context.cursor_position]
        if context.full_text.lstrip().startswith("%%dockerfile"):
            words, fragment, kinds = _dockerfile(context, before, host_for)
            return _answer(SimpleCompletion, words, fragment, kinds)
        match = magic.match(before)
        if match is None:
            return {"completions": [], "suppress": False}
        name, rest = match.groups()
        return _answer(SimpleCompletion, *_command(roots[name], name, rest, host_for))

    return labkernel_matcher


def _answer(
    simple: Any, found: Sequence[str], fragment: str, kinds: Callable[[str], str] | None = None
) -> dict[str, Any]:
    # IPython only lets a matcher that has something silence the others; the word itself changes nothing.
    texts = list(found) or [fragment]
    kind = kinds or (lambda word: "flag" if word.startswith("-") else "magic")
    return {
        "completions": [simple(text=text, type=kind(text)) for text in texts],
        "suppress": True,
        "matched_fragment": fragment,
    }


def _dockerfile(
    context: Any, before: str, host_for: Callable[[str], Any]
) -> tuple[list[str], str, Callable[[str], str] | None]:
    host = host_for("%%dockerfile")
    first, *lines = context.full_text.split("\n")
    if context.cursor_line == 0:
        from .build import cell

        return *_complete(cell, before.partition("%%dockerfile")[2], host), None
    from .dockerwords import complete, find_place, kind_of
    from .grammar import image_tags

    known: list[str] = []

    def images() -> list[str]:
        # Completion must never be the place where an error shows.
        with suppress(Exception):
            known.extend(image_tags(host))
        return known

    given = re.search(r"--context[ =](\S+)", first)
    directory = str(host.working_dir() / (given.group(1) if given else "."))
    above = lines[: context.cursor_line - 1]
    stages = find_place(above, before).stages
    words, fragment = complete(above, before, images=images, directory=directory)
    return words, fragment, lambda word: kind_of(word, stages, known)


def _command(root: Any, name: str, rest: str, host_for: Callable[[str], Any]) -> tuple[list[str], str]:
    if isinstance(root, str):
        import click

        from .tree import ROOT

        root = ROOT.get_command(click.Context(ROOT), root)
    return _complete(root, rest, host_for(f"%{name}"))


def _complete(root: Any, line: str, host: Any) -> tuple[list[str], str]:
    """(completions, the fragment they replace) for the words of a command line up to the cursor."""
    from click.shell_completion import ShellComplete

    try:
        words = shlex.split(line)
    except ValueError:
        return [], line.rpartition(" ")[2]
    fragment = "" if not line or line[-1].isspace() or not words else words.pop()
    completer = ShellComplete(root, {"obj": host}, host.prog, "_LABKERNEL_COMPLETE")
    try:
        items = completer.get_completions(words, fragment)
    except Exception:
        # A line that does not parse yet is not an error of the person who is typing it.
        return [], fragment
    return sorted({str(item.value) for item in items if str(item.value).startswith(fragment)}), fragment
