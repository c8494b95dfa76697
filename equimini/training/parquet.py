"""Pictures in Parquet files, as data sets' hubs keep them, read by pyarrow."""

from __future__ import annotations

import json
import os
from typing import Any

from equimini.training.search import NO_LABEL, Damaged, Search
from equimini.utils.errors import UserError, first_line

GROUP_BYTES = 2**26  # of row groups kept by a process, which is at least one, whatever it has
LARGE = (f"row groups of more than {GROUP_BYTES >> 20} MB, of which each is read whole for one "
         "picture (write the files anew with smaller ones)")
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls")


def scan_parquet(path: str, volume: int, found: Search) -> None:
    """Rows of a Parquet file with pictures' bytes; an offset is a row group and a row in it.

    Raises Damaged, and UserError for a file without such a column.
    """
    file = open_parquet(path)
    image, labels, names = parquet_columns(file, path)
    found.class_names = names or found.class_names
    column = image.removesuffix(".bytes")
    stem, used = os.path.splitext(os.path.basename(path))[0], set()
    for group in range(file.num_row_groups):
        wanted = [c for c in (labels, f"{column}.path") if c]
        try:
            table = file.read_row_group(group, wanted, use_threads=False)
        except (OSError, ValueError) as error:  # pyarrow's own are of these
            raise Damaged(f"row group {group}: {first_line(error)}") from None
        rows = file.metadata.row_group(group).num_rows
        if file.metadata.row_group(group).total_byte_size > GROUP_BYTES:
            found.leave_out(LARGE, f"{path}, {rows} rows")
        numbers = table.column(labels).to_pylist() if labels else [""] * rows
        paths = [None] * rows
        if column in table.column_names and column != labels:
            paths = [value and value["path"] for value in table.column(column).to_pylist()]
        for row, (label, name) in enumerate(zip(numbers, paths)):
            if isinstance(label, float):  # whole numbers among which some are missing
                label = None if label != label else int(label) if label.is_integer() else label
            if label is None:
                found.leave_out(NO_LABEL, f"row {row} of group {group} of {path}")
                continue
            name = os.path.basename(name or f"{stem}-{group:05d}-{row:05d}")
            name = f"{group:05d}-{row:05d}-{name}" if (label, name) in used else name
            used.add((label, name))
            found.add(name, volume, group << 32 | row, 0, str(label))


def open_parquet(path: str) -> Any:
    """The file, by pyarrow.  Raises Damaged, and UserError where pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet is read by pyarrow, which is missing here; install it with pip "
                        "install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise Damaged(f"it is cut short, or no Parquet file ({first_line(error)}); what describes "
                      "it stands at its end, so that nothing of it can be read") from None


def parquet_columns(file: Any, path: str) -> tuple[str, str, list[str]]:
    """The columns of pictures' bytes and of labels ("": none), and the names of the classes.

    Raises UserError where there is no such column, or labels are no single values.
    """
    from pyarrow import types
    schema = file.schema_arrow
    images = {f.name: f"{f.name}.bytes" if types.is_struct(f.type) else f.name for f in schema
              if types.is_binary(f.type) or types.is_large_binary(f.type)
              or types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0}
    name = next((name for name in (*IMAGE_COLUMNS, *images) if name in images), "")
    places = [k for k in range(len(file.schema)) if file.schema.column(k).path == images.get(name)]
    groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    known = [(g.column(k).statistics, g.num_rows) for g in groups for k in places]
    if not name or known and all(s and s.null_count == rows for s, rows in known):
        raise UserError(f"{path} has no column that holds the bytes of pictures; its columns are "
                        f"{', '.join(schema.names)}" + f" ({name} holds none)" * bool(name))
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        classes = {n: [str(c) for c in features[n]["names"]] for n in schema.names
                   if features[n].get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):  # other software's, or none
        classes = {}
    label = next((n for n in (*classes, *LABEL_COLUMNS) if n in schema.names), "")
    if label and types.is_nested(schema.field(label).type):
        raise UserError(f"the labels in {path} are no single values but {schema.field(label).type}")
    return images[name], label, classes.get(label, [])


def read_group(file: Any, group: int) -> Any:
    """The bytes of the pictures in a row group."""
    image = parquet_columns(file, "")[0]
    return file.read_row_group(group, [image], use_threads=False).flatten().column(0)
