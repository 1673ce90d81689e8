"""Flattened device trees: read, change, write (Devicetree Specification, chapter 5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

MAGIC = 0xD00DFEED
VERSION, LAST_COMPATIBLE = 17, 16
BEGIN_NODE, END_NODE, PROP, NOP, END = 1, 2, 3, 4, 9
HEADER = struct.Struct(">10I")


@dataclass
class Node:
    """A node: properties as raw bytes, subnodes by name, both in order."""

    properties: dict[str, bytes] = field(default_factory=dict)
    nodes: dict[str, "Node"] = field(default_factory=dict)

    def node(self, name: str) -> "Node":
        """The subnode `name`, which is made if there is none."""
        return self.nodes.setdefault(name, Node())


@dataclass
class Tree:
    """A device tree. `reserved` is the memory reservation block as it stands there."""

    root: Node
    reserved: bytes
    boot_cpu: int


def cell(value: int) -> bytes:
    """`value` as one cell: 32 bits, big-endian."""
    return struct.pack(">I", value)


def pairs(*values: int) -> bytes:
    """`values` as two cells each: 64 bits, big-endian."""
    return struct.pack(f">{len(values)}Q", *values)


def string(text: str) -> bytes:
    """`text` as a property's value."""
    return text.encode() + b"\0"


def parse(blob: bytes) -> Tree:
    """Read a flattened tree. Raises ValueError when it is none."""
    magic, _, structure, strings, reserve, _, _, boot_cpu, _, _ = HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise ValueError("not a flattened device tree")
    at = structure
    root = Node()
    stack: list[Node] = []
    while True:
        (token,) = struct.unpack_from(">I", blob, at)
        at += 4
        if token == BEGIN_NODE:
            end = blob.index(b"\0", at)
            stack.append(stack[-1].node(blob[at:end].decode()) if stack else root)
            at = _aligned(end + 1)
        elif token == END_NODE:
            stack.pop()
        elif token == PROP:
            length, name = struct.unpack_from(">2I", blob, at)
            start = strings + name
            stack[-1].properties[blob[start:blob.index(b"\0", start)].decode()] = blob[at + 8:at + 8 + length]
            at = _aligned(at + 8 + length)
        elif token == END:
            break
        elif token != NOP:
            raise ValueError(f"token {token} in a flattened device tree")
    end = reserve
    while any(blob[end:end + 16]):
        end += 16
    return Tree(root, blob[reserve:end + 16], boot_cpu)


def flatten(tree: Tree) -> bytes:
    """Write `tree`."""
    strings: dict[str, int] = {}
    table = bytearray()
    body = bytearray()

    def put(name: str, node: Node) -> None:
        body.extend(_padded(struct.pack(">I", BEGIN_NODE) + string(name)))
        for key, value in node.properties.items():
            if key not in strings:
                strings[key] = len(table)
                table.extend(string(key))
            body.extend(_padded(struct.pack(">3I", PROP, len(value), strings[key]) + value))
        for key, child in node.nodes.items():
            put(key, child)
        body.extend(struct.pack(">I", END_NODE))

    put("", tree.root)
    body.extend(struct.pack(">I", END))
    reserve = HEADER.size
    structure = reserve + len(tree.reserved)
    names = structure + len(body)
    total = names + len(table)
    return HEADER.pack(MAGIC, total, structure, names, reserve, VERSION, LAST_COMPATIBLE,
                       tree.boot_cpu, len(table), len(body)) + tree.reserved + bytes(body) + bytes(table)


def _aligned(offset: int) -> int:
    return (offset + 3) & ~3


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
