"""PTX text -> instructions.

One pass over the text splits it into statements. Names declared inside braces (the `{ .reg .pred p; ... }` of inline
assembly) get names of their own, so that everything after this file sees one flat list of instructions.
"""

import re
from dataclasses import dataclass, field

from .errors import PtxError, UnknownInstruction

_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_SCAN = re.compile(r"//[^\n]*|\n|;|[{}]|[ \t]*\.(?:loc|file|pragma)\b[^\n]*|[ \t]*[$%\w.]+[ \t]*:(?!:)|[^;{}\n/]+|/")
_PART = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s\[{][^,]*")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)"
    r"(?:\s*\[(\d*)\])?(?:\s*=\s*(.*))?$",
    re.S,
)


@dataclass(frozen=True)
class Address:
    """`[base + offset]`, for tensor maps `[base, {coordinates}]`."""

    base: str
    offset: int = 0
    coordinates: tuple[str, ...] = ()


Operand = str | tuple | Address


@dataclass(eq=False)
class Instruction:
    name: str  # with all its modifiers, as "ld.global.v4.b32"
    operands: list[Operand]
    guard: str | None  # the predicate register of @p or @!p
    negated: bool
    line: int  # of the PTX
    source: str  # "file:line" of what it was compiled from, if the PTX says so
    target: int = -1  # of a branch
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        where = f" ({self.source})" if self.source else ""
        return f"{guard}{self.name} {', '.join(map(_show, self.operands))}, PTX line {self.line}{where}"


def _show(operand: Operand) -> str:
    if isinstance(operand, tuple):
        return "{" + ", ".join(operand if len(operand) <= 8 else (operand[0], "...", operand[-1])) + "}"
    if isinstance(operand, Address):
        inside = operand.base + (f"+{operand.offset}" if operand.offset else "")
        return f"[{inside}{', {' + ', '.join(operand.coordinates) + '}' if operand.coordinates else ''}]"
    return operand


@dataclass
class Variable:
    space: str
    size: int  # bytes; 0: the dynamic shared memory
    align: int
    data: bytes = b""


@dataclass
class Parameter:
    name: str
    type: str
    size: int  # bytes: more than one value where it is a struct
    align: int


@dataclass
class Kernel:
    name: str
    target: str
    version: str
    parameters: list[Parameter]
    registers: dict[str, str]  # name -> type
    variables: dict[str, Variable]
    code: list[Instruction] = field(default_factory=list)
    threads: int | None = None  # .reqntid

    def parameter_offsets(self) -> dict[str, int]:
        """Where each parameter lies in the parameter block."""
        offset, offsets = 0, {}
        for parameter in self.parameters:
            offset = -(-offset // parameter.align) * parameter.align
            offsets[parameter.name] = offset
            offset += parameter.size
        return offsets


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel `name` of a PTX module, or its only one."""
    text = _COMMENT.sub(lambda m: "\n" * m.group().count("\n"), text)
    entries = {m.group(1): m for m in re.finditer(r"\.entry\s+([$\w]+)\s*(\([^)]*\))?", text)}
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    if name not in entries:
        raise PtxError(f"kernel {name!r} is not in this PTX, which has {sorted(entries)}")
    entry = entries[name]
    head = text[: min(m.start() for m in entries.values())]
    kernel = Kernel(
        name,
        _directive(head, "target"),
        _directive(head, "version"),
        [_parameter(p) for p in (entry.group(2) or "()")[1:-1].split(",") if p.strip()],
        {},
        {},
    )
    if bounds := re.match(r"[^{]*?\.reqntid\s+([\d, ]+)", text[entry.end() :]):
        kernel.threads = _product(bounds.group(1))
    for statement in re.sub(r"//[^\n]*", "", head).split(";"):
        if declared := _VARIABLE.search(statement.strip()):
            kernel.variables[declared.group(4)] = _variable(declared)
    start = text.index("{", entry.end())
    _Body(kernel, text, start).read()
    return kernel


class _Body:
    """The statements of one kernel, read in order; scopes is a stack of {declared name: unique name}."""

    def __init__(self, kernel: Kernel, text: str, start: int):
        self.kernel, self.text, self.at = kernel, text, start
        self.line = text.count("\n", 0, start) + 1
        self.source = ""
        self.files = {m[0]: m[1] for m in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
        self.scopes: list[dict[str, str]] = []
        self.labels: dict[str, int] = {}
        self.waiting: list[tuple[Instruction, str, list[dict[str, str]]]] = []
        self.serial = 0

    def read(self) -> None:
        statement, line = "", self.line
        inside = 0  # braces of an operand
        for match in _SCAN.finditer(self.text, self.at):
            token = match.group()
            if token == "\n":
                self.line += 1
                statement += " "
            elif token.startswith("//") or token.split()[:1] in ([".file"], [".pragma"]):
                continue
            elif token.split()[:1] == [".loc"] and not statement.strip():
                _, file, number, *_ = token.split()
                self.source = f"{self.files.get(file, file).rsplit('/', 1)[-1]}:{number}"
            elif token == "{" and not statement.strip():
                self.scopes.append({})
            elif token == "{":
                inside += 1
                statement += token
            elif token == "}" and inside:
                inside -= 1
                statement += token
            elif token == "}":
                self.scopes.pop()
                if not self.scopes:
                    break
            elif token == ";":
                self.add(statement.strip(), line)
                statement = ""
            elif token.rstrip().endswith(":") and not statement.strip():
                label = token.strip()[:-1].rstrip()
                self.labels[self.declare(label, "label")] = len(self.kernel.code)
            else:
                if not statement.strip() and token.strip():
                    line = self.line
                statement += token
        for instruction, label, scopes in self.waiting:
            resolved = self.resolve(label, scopes)
            if resolved not in self.labels:
                raise PtxError(f"label {label} is nowhere: {instruction}")
            instruction.target = self.labels[resolved]

    def declare(self, name: str, kind: str) -> str:
        unique = name
        if len(self.scopes) > 1:
            self.serial += 1
            unique = f"{name}#{self.serial}"
        self.scopes[-1][name] = unique
        if kind != "label":
            self.kernel.registers[unique] = kind
        return unique

    @staticmethod
    def resolve(name: str, scopes: list[dict[str, str]]) -> str:
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        return name

    def add(self, statement: str, line: int) -> None:
        if not statement:
            return
        if statement.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", statement, re.S).groups()
            for name in (n.strip() for n in names.split(",")):
                if many := re.match(r"(.*)<(\d+)>$", name):
                    for i in range(int(many.group(2))):
                        self.declare(f"{many.group(1)}{i}", kind)
                else:
                    self.declare(name, kind)
            return
        if declared := _VARIABLE.match(statement):
            self.kernel.variables[declared.group(4)] = _variable(declared)
            return
        if statement.startswith("."):
            raise UnknownInstruction(f"directive {statement!r}, PTX line {line}")
        guard, negated = None, False
        if guarded := re.match(r"@(!?)\s*([$%\w.]+)\s+(.*)", statement, re.S):
            negated, guard = bool(guarded.group(1)), self.resolve(guarded.group(2), self.scopes)
            statement = guarded.group(3)
        name, _, rest = re.sub(r"\s+", " ", statement).partition(" ")
        instruction = Instruction(name, [], guard, negated, line, self.source, parts=tuple(name.split(".")))
        if instruction.parts[0] == "bra":
            instruction.operands.append(rest.strip())
            self.waiting.append((instruction, rest.strip(), list(self.scopes)))
        else:
            for part in _PART.findall(rest):
                instruction.operands.append(self.operand(part.strip()))
        self.kernel.code.append(instruction)

    def operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return tuple(self.name(part) for part in text[1:-1].split(","))
        if text.startswith("["):
            inner, _, coordinates = text[1:-1].partition(",")
            base, sign, offset = (s.strip() for s in re.match(r"([^+-]+)(\+?-?)(.*)", inner.replace(" ", "")).groups())
            value = int(sign[-1] + offset, 0) if sign else 0
            names = tuple(self.name(c) for c in coordinates.strip(" {}").split(",") if c.strip())
            return Address(self.name(base), value, names)
        if "|" in text:
            return tuple(self.name(part) for part in text.split("|"))
        return self.name(text)

    def name(self, text: str) -> str:
        text = text.strip()
        negated = text.startswith("!")
        name = self.resolve(text.lstrip("!").strip(), self.scopes)
        return f"!{name}" if negated else name


def _directive(text: str, name: str) -> str:
    found = re.search(rf"\.{name}\s+([\w.]+)", text)
    if found is None:
        raise PtxError(f"no .{name} directive: is this PTX?")
    return found.group(1)


def _product(text: str) -> int:
    product = 1
    for number in text.replace(" ", "").split(","):
        product *= int(number or 1)
    return product


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def _bytes(kind: str) -> int:
    return _SIZES[re.sub(r"\D", "", kind)]


def _parameter(text: str) -> Parameter:
    kind = re.search(r"\.([busf]\d+)\b", text).group(1)
    name, count = re.search(r"([$\w]+)\s*(?:\[(\d+)\])?\s*$", text).groups()
    align = re.search(r"\.align\s+(\d+)", text)
    size = _bytes(kind) * int(count or 1)
    return Parameter(name, kind, size, int(align.group(1)) if align and count else _bytes(kind))


def _variable(match: re.Match) -> Variable:
    space, align, kind, _, count, values = match.groups()
    width = _bytes(kind)
    size = width * int(count or (0 if count == "" else 1))
    data = b""
    if values:
        numbers = [int(v, 0) for v in values.strip(" {}").split(",")]
        data = b"".join(v.to_bytes(width, "little", signed=v < 0) for v in numbers)
    return Variable(space, size, int(align or width), data)
