"""`limbeck data`."""

from __future__ import annotations


def data() -> None:
    """List the embedded data sets, and how to name your own.

    Example: limbeck data
    """
    from rich.console import Console
    from rich.table import Table

    from limbeck.data import listing
    from limbeck.data.text import listing as texts
    from limbeck.rendering.scenes import listing as scenes

    for rows in (listing(), texts(), scenes()):
        table = Table(box=None, pad_edge=False)
        for key in rows[0]:
            table.add_column(key, overflow="fold")
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        Console().print(table)
        print()
    print("your own: hf:<id or folder>  folder:<images>  csv:<file>  parquet:<file>  idx:<folder>")
    print("larger than memory: stream:<folder, file or pattern of Parquet files>  stream:hf:<id>   (docs/scale.md)")
    print("views:    posed:<folder> with transforms.json and pictures")
    print("texts:    text:<folder or pattern>  jsonl:<file>, and with a `text` block in the recipe csv:, parquet: and hf: too")
