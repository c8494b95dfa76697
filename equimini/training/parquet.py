"""Pictures in Parquet files, as data sets' hubs keep them, read by pyarrow."""

from __future__ import annotations

import json
import os
from typing import Any

from equimini.training.search import NO_LABEL, Damaged, Search
from equimini.utils.errors import UserError, first_line

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls")


def scan_parquet(path: str, volume: int, found: Search) -> None:
    """Rows of a Parquet file with pictures' bytes; an offset is a row group and a row in it.

    Raises Damaged, and UserError for a file without such a column.
    """
    file = open_parquet(path)
    images, labels = parquet_columns(file, path, found)
    stem, used = os.path.splitext(os.path.basename(path))[0], set()
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, [c for c in (labels, f"{images}.path") if c])
        rows = file.metadata.row_group(group).num_rows
        numbers = table.column(labels).to_pylist() if labels else [None] * rows
        paths = [None] * rows
        if images in table.column_names and images != labels:
            paths = [value and value["path"] for value in table.column(images).to_pylist()]
        for row, (label, name) in enumerate(zip(numbers, paths)):
            if labels and label is None:
                found.leave_out(NO_LABEL, f"row {row} of group {group} of {path}")
                continue
            name = os.path.basename(name or f"{stem}-{group:05d}-{row:05d}")
            name = f"{group:05d}-{row:05d}-{name}" if (label, name) in used else name
            used.add((label, name))
            found.add(name, volume, group << 32 | row, 0,
                      "" if label is None else str(label).replace("/", "_"))


def open_parquet(path: str) -> Any:
    """The file, by pyarrow.  Raises Damaged, and UserError where pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet is read by pyarrow, which is missing here; install it with pip "
                        "install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise Damaged(f"it is cut short, or no Parquet file ({first_line(error)}); what describes "
                      "it stands at its end, so that nothing of it can be read") from None


def parquet_columns(file: Any, path: str, found: Search) -> tuple[str, str]:
    """The columns of pictures and of labels ("": none), whose names go into `found`."""
    from pyarrow import types
    schema = file.schema_arrow
    images = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)
              or types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    images = [name for name in IMAGE_COLUMNS if name in images] or images
    if not images:
        raise UserError(f"{path} has no column that holds the bytes of pictures; its columns are "
                        f"{', '.join(schema.names)}")
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    features = features.get("features", {})
    known = [n for n in schema.names if isinstance(features.get(n), dict)
             and features[n].get("_type") == "ClassLabel"]
    labels = (known + [n for n in LABEL_COLUMNS if n in schema.names] + [""])[0]
    if known:
        found.class_names = [str(name) for name in features[labels]["names"]]
    return images[0], labels
