"""C++ text as tokens, and walks over them."""

from __future__ import annotations

import re

from .toolchain import CompileError

_TOKEN = re.compile(
    r"""\s+|^\#[^\n]*|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\.?\d(?:[eEpP][+-]|[\w.])*"""
    r"""|[A-Za-z_]\w*|::|->|\+\+|--|<<=|>>=|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\.\.\.|\[\[|.""",
    re.S | re.M,
)
_CLOSER = {"(": ")", "[": "]", "{": "}", "[[": "]"}
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*$")


def tokenize(text: str) -> list[str]:
    """Every character of `text` lies in one token; white space and comments are tokens too."""
    return _TOKEN.findall(text)


def is_blank(token: str) -> bool:
    """White space, a comment, or a whole preprocessor line."""
    return token.isspace() or token.startswith(("//", "/*")) or is_directive(token)


def is_directive(token: str) -> bool:
    return token.startswith("#") and len(token) > 1


def is_name(token: str) -> bool:
    return bool(_IDENTIFIER.match(token))


def split_commas(tokens: list[str]) -> list[list[str]]:
    """`tokens` cut at the commas that no bracket encloses."""
    parts: list[list[str]] = []
    part: list[str] = []
    depth = 0
    for token in tokens:
        if token in ("(", "[", "{", "<"):
            depth += 1
        elif token in (")", "]", "}", ">"):
            depth -= 1
        elif token == "[[":
            depth += 2
        elif token == ">>":
            depth -= 2
        if token == "," and depth == 0:
            parts.append(part)
            part = []
        else:
            part.append(token)
    if any(not is_blank(token) for token in part):
        parts.append(part)
    return parts


class Tokens:
    """Tokens of one source, with steps that skip blanks and brackets."""

    def __init__(self, text: str):
        self.all = tokenize(text)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, i):
        return self.all[i]

    def after(self, i: int) -> int:
        """Index of the next token that is not blank, after token i; len(self) at the end."""
        i += 1
        while i < len(self.all) and is_blank(self.all[i]):
            i += 1
        return i

    def before(self, i: int) -> int:
        """Index of the last token that is not blank, before token i; -1 at the start."""
        i -= 1
        while i >= 0 and is_blank(self.all[i]):
            i -= 1
        return i

    def close(self, i: int) -> int:
        """Index of the bracket that closes the one at i."""
        opener, closer = self.all[i], _CLOSER[self.all[i]]
        depth = 0
        while i < len(self.all):
            token = self.all[i]
            if opener == "[[" and token == "[[":
                depth += 2
            elif token == opener:
                depth += 1
            elif token == closer:
                depth -= 1
                if depth == 0:
                    return i
            i += 1
        raise CompileError(f"a {opener} is never closed")

    def close_angle(self, i: int) -> int:
        """Index of the > that closes the < at i, or -1 where it is a comparison."""
        depth = 0
        while i < len(self.all):
            token = self.all[i]
            if token == "<":
                depth += 1
            elif token == ">":
                depth -= 1
            elif token == ">>":
                depth -= 2
            elif token in ("(", "["):
                i = self.close(i)
            elif token in (";", "{", "}", "||"):
                return -1
            if depth <= 0:
                return i
            i += 1
        return -1

    def skip_attributes(self, i: int) -> int:
        """Index of the first token at or after i that is not an [[attribute]]."""
        while i < len(self.all) and self.all[i] == "[[":
            i = self.after(self.close(i))
        return i

    def until(self, i: int, stop: str) -> int:
        """Index of the next `stop` at or after i, outside brackets."""
        while self.all[i] != stop:
            if self.all[i] in ("(", "["):
                i = self.close(i)
            i += 1
        return i

    def text(self, first: int, end: int) -> str:
        return "".join(self.all[first:end])
