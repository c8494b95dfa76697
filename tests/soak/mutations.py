"""Right files made into damaged or odd ones; every function takes a source of random numbers."""

from __future__ import annotations

import io
import json
import random
import zipfile
from typing import Any

import torch

NUMBERS = (0, 1, 127, 128, 255, 2**15 - 1, 2**16 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
ODD = (None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf"), "",
       "..", "../x", "/", "a\0b", "\ud800", "x" * 3000, [], [[]], {}, {"": 1}, [None] * 3, b"")


def damage(draw: random.Random, data: bytes) -> bytes:
    """One to four changes of bytes: flipped, cut off, taken out, put in, doubled, zeroed."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, size = draw.randrange(len(found) + 1), draw.choice((1, 2, 4, 8, 100, 5000))
        part = found[at:at + size]
        match draw.randrange(7):
            case 0 if at < len(found):
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                del found[at:]
            case 2:
                del found[at:at + size]
            case 3:
                found[at:at] = draw.randbytes(min(size, 100))
            case 4:
                found[at:at] = part
            case 5:
                found[at:at + size] = bytes(len(part))
            case _:
                number, width = draw.choice(NUMBERS), draw.choice((1, 2, 4, 8))
                found[at:at + width] = (number % 256**width).to_bytes(
                    width, draw.choice(("little", "big")))
    return bytes(found)


def in_zip(draw: random.Random, data: bytes) -> bytes:
    """A zip with one member changed, left out, doubled or renamed; its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    k, written = draw.randrange(len(members)), io.BytesIO()
    name, content = members[k]
    other = draw.choice((name[:-1], "../" + name, name.upper(), "x"))
    head = damage(draw, content[:128]) + content[128:]  # the first bytes say what it is
    whole = name, damage(draw, content)
    members[k:k + 1] = draw.choice(([], [members[k], whole], [(other, content)], [(name, head)],
                                    [whole], [whole], [whole], [whole]))
    how = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(written, "w", how) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return written.getvalue()


def in_checkpoint(draw: random.Random, data: bytes) -> bytes:
    """A checkpoint with one or two of its values or keys changed."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(draw.choice((1, 1, 2))):
        content = changed(draw, content, odd_tensor)
    written = io.BytesIO()
    torch.save(content, written)
    return written.getvalue()


def in_json(draw: random.Random, data: bytes) -> bytes:
    """JSON, or lines of it, with a value or a key changed."""
    lines = data.decode().splitlines(keepends=True)
    if whole := not lines[0].rstrip().endswith("}"):
        lines = [data.decode()]
    k = draw.randrange(len(lines))
    value = changed(draw, json.loads(lines[k]), lambda draw, old: draw.choice(ODD))
    lines[k] = json.dumps(value, default=repr) + ("" if whole else "\n")
    if draw.random() < 0.1:
        lines.append(draw.choice(("[" * 10**5, "{}\n", "null\n", "\n", "\xff\n", '{"step": 1')))
    return "".join(lines).encode("utf-8", "replace")


def changed(draw: random.Random, value: Any, leaf: Any) -> Any:
    """A nest of dicts and lists with one place, at random, that is odd."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(
        value, (list, tuple)) else []
    if not keys or draw.random() < 0.05:
        return draw.choice(ODD) if draw.random() < 0.4 else leaf(draw, value)
    key, copy = draw.choice(keys), dict(value) if isinstance(value, dict) else list(value)
    chance = draw.random()
    if chance < 0.1:
        del copy[key]
    elif chance < 0.15 and isinstance(copy, dict):
        copy[draw.choice(("", "x", 0, str(key) + ".weight"))] = copy.pop(key)
    else:
        copy[key] = changed(draw, copy[key], leaf)
    return tuple(copy) if isinstance(value, tuple) else copy


def odd_tensor(draw: random.Random, old: Any) -> Any:
    """A tensor of another shape, dtype or content; of anything else, something near it."""
    if isinstance(old, torch.Tensor):
        filled = (lambda x: torch.full_like(old, x) if old.is_floating_point() else old * 0)
        return draw.choice((
            lambda: old[None], lambda: old.flatten(), lambda: old[:0] if old.dim() else old.int(),
            lambda: old.to(torch.complex64), lambda: old.to(torch.int64), lambda: old.bool(),
            lambda: filled(float("nan")), lambda: filled(6e4), lambda: filled(0.0),
            lambda: old.double(), lambda: old.half(), lambda: torch.zeros(1).expand(2**40),
            lambda: torch.zeros(3, 0, 5), lambda: torch.tensor(1.0),
            lambda: old.to_sparse(), lambda: old.tolist()))()
    if isinstance(old, bool) or old is None:
        return draw.choice((not old, 2))
    if isinstance(old, (int, float)):
        return draw.choice((-old, old + 1, old * 2, old * 10**6, str(old), [old], float(old)))
    return draw.choice((str(old) + "x", [old], "")) if isinstance(old, str) else draw.choice(ODD)
