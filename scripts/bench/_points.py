"""Counted points of a picture: in a table of results, and between two marks of a page.

Must not know what is counted.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

P = TypeVar("P")


def read_points(kind: type[P], path: Path) -> list[P]:
    """The committed points, of a dataclass of texts and numbers."""
    if not path.exists():
        return []
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    numbers = {field.name for field in fields if field.type == "int"}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [kind(**{k: int(v) if k in numbers else v for k, v in row.items()}) for row in rows]


def write_points(kind: type[P], path: Path, points: Iterable[P]) -> None:
    """Write them."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(point, name) for name in names] for point in points)


def between_marks(text: str, name: str, body: str) -> str:
    """The page with this between its marks."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(f"{marks[0]}.*?{marks[1]}", f"{marks[0]}\n{body}\n{marks[1]}", text, flags=re.S)


def llama_3_1(size: str) -> dict[str, int]:
    """Llama 3.1's config of that size: 8B or 70B."""
    shapes = {
        "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32},
        "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
        | {"num_hidden_layers": 80},
    }
    shared = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
    return shapes[size] | shared
