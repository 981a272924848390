"""Metal source to what clang accepts as C++ for OpenCL.

Most of the language is the header include/msl/msl.h. This pass handles what no header can: kernels
and their attributes, explicit instantiations, threadgroup variables, function constants, the
constructor syntax of vectors, `thread` on methods and parameters, literals like 1.0bf.
"""

from __future__ import annotations

import re

from .tokens import Tokens, is_blank, is_directive, is_name, split_commas
from .toolchain import CompileError
from .unit import Unit, parse_param

_INTEGERS = ("char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "bool")
ELEMENTS = ("float", "half", "bfloat", *_INTEGERS)
VECTORS = {f"{element}{n}" for element in ELEMENTS for n in (2, 3, 4)}
#: Replaced by __private, or dropped where a method's object may lie elsewhere (msl.py tries both).
THREAD_METHOD = "/*SIMT_T*/ "
_NOT_METHODS = ("decltype", "alignas", "__attribute__", "static_assert")


def rewrite(preprocessed: str) -> Unit:
    """The unit for a preprocessed source (line markers kept)."""
    return _Rewriter(preprocessed).run()


class _Rewriter:
    def __init__(self, text: str):
        self.tokens = Tokens(text)
        self.out: list[str] = []
        self.unit = Unit()
        self.vectors = set(VECTORS)
        self.type_parameters: set[str] = set()
        self.scopes: list[str | None] = []  # a class's name inside its body, else None
        self.class_name: str | None = None  # of a class whose body has not begun
        self.statement: list[str] = []
        self.threadgroup_count = 0
        self.rules = {
            "template": self._instantiation,
            "kernel": self._kernel,
            "[[": self._attribute,
            "constant": self._constant,
            "threadgroup": self._threadgroup,
            "thread": self._thread,
            "using": self._alias,
            "typedef": self._alias,
            "static_cast": self._static_cast,
            "long": self._long_long,
            "typename": self._type_parameter,
            "class": self._type_parameter,
            "vec": self._vec_template,
        }

    def run(self) -> Unit:
        i = 0
        while i < len(self.tokens):
            token = self.tokens[i]
            if is_blank(token):
                keep = not is_directive(token) or re.match(r"#\s+\d+|#\s*pragma clang", token)
                self.out.append(token if keep else "")
                i += 1
                continue
            self._follow(i, token)
            done = self._apply(i, token)
            if done is None:
                self.out.append(token)
                done = i + 1
            i = done
        self.unit.text = "".join(self.out)
        return self.unit

    def _apply(self, i: int, token: str) -> int | None:
        """The index after what a rule replaced, or None where the token stays as it is."""
        rule = self.rules.get(token)
        if rule:
            return rule(i)
        if token in self.vectors:
            return self._vector(i)
        if token in self.type_parameters:
            return self._type_parameter_cast(i)
        lower = token.lower()
        if re.match(r"\.?\d", token) and lower.endswith("bf") and not lower.startswith("0x"):
            self.out.append(f"((bfloat){token[:-2]}f)")
            return i + 1
        return None

    def _follow(self, i: int, token: str) -> None:
        """Keeps the current statement and the classes around it."""
        if token in ("struct", "class"):
            self.class_name = self.tokens[self.tokens.after(i)]
        if token == ";":
            self.class_name, self.statement = None, []
        elif token == "{":
            self.scopes.append(None if "(" in self.statement else self.class_name)
            self.class_name, self.statement = None, []
        elif token == "}":
            if self.scopes:
                self.scopes.pop()
            self.statement = []
        elif token == ":" and self.statement[-1:] in (["public"], ["private"], ["protected"]):
            self.statement = []
        else:
            self.statement.append(token)

    # -- kernels

    def _instantiation(self, i: int) -> int | None:
        """template [[host_name("name")]] [[kernel]] decltype(f<4>) f<4>;  and its older forms"""
        if self.tokens[self.tokens.after(i)] != "[[":
            return None
        end = i
        while self.tokens[end] != ";":
            end += 1
        text = self.tokens.text(i, end)
        names = re.search(r'host_name\(\s*((?:"[^"]*"\s*)+)\)', text)
        if names:
            host = "".join(re.findall(r'"([^"]*)"', names[1]))
            self.unit.instances[host] = self._instantiated(text)
        self.out.append("\n" * text.count("\n"))
        return end + 1

    @staticmethod
    def _instantiated(text: str) -> str:
        if "decltype" in text:
            tokens = Tokens(text[text.index("decltype") + len("decltype") :])
            opener = tokens.all.index("(")
            return tokens.text(opener + 1, tokens.close(opener)).strip()
        found = re.search(r"\bvoid\s+([\w:]+\s*(?:<.*?>)?)\s*\(", text, re.S) or re.search(
            r"\bkernel\b(?:\s*\]\])?\s*[\w:]+(?:\s*<[^;]*?>)?\s+([\w:]+\s*(?:<[^;]*>)?)\s*$",
            text,
            re.S,
        )
        if not found:
            raise CompileError(f"an instantiation this simulator cannot read: {text.strip()!r}")
        return found[1].strip()

    def _attribute(self, i: int) -> int | None:
        first = self.tokens[self.tokens.after(i)]
        end = self.tokens.close(i)
        if first == "kernel":
            self._note_kernel(self.tokens.after(end))
            return end + 1
        return end + 1 if first == "host_name" else None

    def _kernel(self, i: int) -> int:
        self._note_kernel(self.tokens.after(i))
        return self.tokens.after(i)

    def _note_kernel(self, i: int) -> None:
        """Reads `void name(parameters)` at i."""
        tokens = self.tokens
        i = tokens.skip_attributes(i)
        if tokens[i] != "void":
            return
        name = tokens.skip_attributes(tokens.after(i))
        opener = tokens.after(name)
        if tokens[opener] == "(":
            inside = tokens[opener + 1 : tokens.close(opener)]
            self.unit.kernels[tokens[name]] = [parse_param(p) for p in split_commas(inside)]

    # -- address spaces

    def _constant(self, i: int) -> int | None:
        """A function constant becomes a variable the host sets; on a method, the object's space"""
        tokens = self.tokens
        end = i
        while end < len(tokens) and tokens[end] not in (";", "{", "(", "=", "[["):
            end += 1
        if tokens[end : end + 1] == ["[["] and tokens[tokens.after(end)] == "function_constant":
            stop = tokens.until(end, ";")
            found = re.search(
                r"constant\s+(?:const\s+)?([\w:]+)\s+(\w+)\s*\[\[\s*function_constant\(([^)]*)\)",
                tokens.text(i, stop),
            )
            kind, name, index = found.groups()
            self.unit.constants[name] = (index, kind)
            self.out.append(
                f"static __global {kind} {name} = 0; "
                f'extern "C" ulong simt_fc_{name}() {{ return (ulong)&{name}; }}'
            )
            return stop + 1
        if self._ends_parameters(i):
            self.out.append("__constant")
            return i + 1
        return None

    def _ends_parameters(self, i: int) -> bool:
        """Whether token i qualifies a method: it follows `)`, `) const` or `noexcept`."""
        before = self.tokens.before(i)
        if before >= 0 and self.tokens[before] == "const":
            before = self.tokens.before(before)
        return before >= 0 and self.tokens[before] in (")", "noexcept")

    def _threadgroup(self, i: int) -> int | None:
        """threadgroup float a[64], b; becomes references into the group's memory"""
        tokens = self.tokens
        before = tokens.before(i)
        if before >= 0 and tokens[before] not in (";", "{", "}", ":", "static"):
            return None
        end = tokens.until(i, ";")
        body, zeroed = self._without_initialiser(tokens[i + 1 : end])
        plain = re.sub(r"\[[^\]]*\]", "", re.sub(r"<[^;]*>", "", "".join(body)))
        if any(sign in plain for sign in "=*&("):  # a pointer or a function
            return None
        kind, variables = self._declarators(split_commas(body))
        for name, dims in variables:
            self.threadgroup_count += 1
            number = self.threadgroup_count
            alias = f"simt_t{number}_{name}"
            self.out.append(
                f"typedef {kind} {alias}{dims}; threadgroup {alias}& {name} = "
                f'simt::shared<{alias}, {number}>("{name}", {int(zeroed)});'
            )
        self.out.append("\n" * tokens.text(i, end).count("\n"))
        return end + 1

    def _without_initialiser(self, body: list[str]) -> tuple[list[str], bool]:
        depth = 0
        for k, token in enumerate(body):
            if token in ("[", "("):
                depth += 1
            elif token in ("]", ")"):
                depth -= 1
            elif token in ("*", "&") and depth == 0:
                break
            elif token == "=" and depth == 0:
                text = "".join(body).strip()[:60]
                self.unit.lint.append(f"threadgroup variable with an initialiser: {text}")
                return body[:k], True
        return body, False

    @staticmethod
    def _declarators(parts: list[list[str]]) -> tuple[str, list[tuple[str, str]]]:
        """("float", [("a", "[64]"), ("b", "")]) of `float a[64], b`"""
        pattern = r"(\w+)\s*((?:\[[^;]*\])*)\s*$"
        first = re.match(r"\s*(.*?)" + pattern, "".join(parts[0]), re.S)
        found = [(first[2], first[3])]
        for part in parts[1:]:
            more = re.match(r"\s*" + pattern, "".join(part), re.S)
            found.append((more[1], more[2]))
        return first[1].strip(), found

    def _thread(self, i: int) -> int | None:
        if self._ends_parameters(i):
            # Constructors and operators also serve temporaries, which lie in the default space.
            if not self._in_constructor():
                self.out.append(THREAD_METHOD)
            return i + 1
        # `const thread T&` must bind temporaries too: the default space covers both.
        words = [self.tokens[max(0, self.tokens.before(i))]]
        depth = 0
        for token in self.tokens[i + 1 : i + 60]:
            if token == "<":
                depth += 1
            elif token == ">":
                depth -= 1
            elif depth == 0 and token == "&":
                return i + 1 if "const" in words else None
            elif depth == 0 and token in (",", ";", "(", ")", "{", "}", "=", "*"):
                return None
            words.append(token)
        return None

    def _in_constructor(self) -> bool:
        statement = self.statement
        if "(" not in statement or "operator" in statement or ":" in statement:
            return True
        name = statement[statement.index("(") - 1]
        return bool(self.scopes and self.scopes[-1] and name == self.scopes[-1])

    # -- vectors

    def _alias(self, i: int) -> None:
        """Notes names for vec<T, N>, whose constructors need the same care."""
        end = i
        while self.tokens[end] not in (";", "{") and end - i < 60:
            end += 1
        text = self.tokens.text(i, end)
        found = re.match(r"using\s+(\w+)\s*=\s*(?:metal\s*::\s*)?vec\s*<", text) or re.match(
            r"typedef\s+(?:metal\s*::\s*)?vec\s*<.*>\s*(\w+)$", text, re.S
        )
        if found and "type" not in text.replace("typedef", "").split("<")[0]:
            self.vectors.add(found[1])

    def _long_long(self, i: int) -> int | None:
        """64 bits in Metal, 128 in OpenCL"""
        return i + 1 if self.tokens[self.tokens.after(i)] == "long" else None

    def _static_cast(self, i: int) -> int | None:
        opener = self.tokens.after(i)
        target = self.tokens.text(opener + 1, self.tokens.close_angle(opener))
        if "&" in target or "*" in target:
            return None
        self.out.append("msl::cast1")
        return i + 1

    def _type_parameter(self, i: int) -> None:
        """Notes T of `template <typename T>`."""
        tokens = self.tokens
        name = tokens.after(i)
        if tokens[max(0, tokens.before(i))] in ("<", ",") and tokens[tokens.after(name)] in ",>=":
            self.type_parameters.add(tokens[name])

    def _type_parameter_cast(self, i: int) -> int | None:
        """T(x) also converts between half and bfloat, and between vectors"""
        tokens = self.tokens
        opener = tokens.after(i)
        before = tokens[max(0, tokens.before(i))]
        if tokens[opener] != "(" or before in ("operator", "~", "::", ".", "->", "typename"):
            return None
        if len(split_commas(tokens[opener + 1 : tokens.close(opener)])) != 1:
            return None
        self.out.append(f"msl::cast1<{tokens[i]}>")
        return i + 1

    def _vector(self, i: int) -> int | None:
        tokens = self.tokens
        kind = tokens[i]
        name = tokens.after(i)
        if name >= len(tokens):
            return None
        if is_name(tokens[name]) and tokens[name] not in ("operator", "const"):
            return self._vector_declaration(i, name)
        before = tokens[max(0, tokens.before(i))]
        if tokens[name] != "(" or before in ("operator", "struct", "~", "typename"):
            return None
        self._drop_metal(before)
        self.out.append(f"msl::mk<{kind}>")
        return i + 1

    def _vector_declaration(self, i: int, name: int) -> int | None:
        """float2 v(a, b); inside a function becomes an initialisation"""
        tokens = self.tokens
        opener = tokens.after(name)
        in_function = self.scopes and not self.scopes[-1]
        if opener >= len(tokens) or tokens[opener] != "(" or not in_function:
            return None
        closer = tokens.close(opener)
        several = len(split_commas(tokens[opener + 1 : closer])) > 1
        if tokens[tokens.after(closer)] != ";" or not several:
            return None
        self.out.append(f"{tokens[i]} {tokens[name]} = msl::mk<{tokens[i]}>(")
        return opener + 1

    def _vec_template(self, i: int) -> int | None:
        """vec<T, 4>(...)"""
        tokens = self.tokens
        opener = tokens.after(i)
        if opener >= len(tokens) or tokens[opener] != "<":
            return None
        closer = tokens.close_angle(opener)
        before = tokens[max(0, tokens.before(i))]
        if closer < 0 or tokens[tokens.after(closer)] != "(" or before in ("operator", "using"):
            return None
        self._drop_metal(before)
        self.out.append("msl::mk<metal::vec" + tokens.text(opener, closer + 1) + " >")
        return closer + 1

    def _drop_metal(self, before: str) -> None:
        """Takes back a written `metal::`, since msl::mk<> follows."""
        if before == "::":
            while self.out and self.out.pop() != "metal":
                pass
