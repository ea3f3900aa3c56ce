"""Parquet and arrow files in the layout that the library `datasets` writes."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image_table(images, columns, features=None, image="image"):
    """Return a table of images, as bytes, a pair (bytes, path) or None, and other columns."""
    structs = [
        None if one is None else dict(zip(("bytes", "path"), one, strict=True))
        if isinstance(one, tuple)
        else {"bytes": one, "path": "a.png"}
        for one in images
    ]  # fmt: skip
    table = pa.table({image: pa.array(structs, IMAGE), **columns})
    described = {image: {"_type": "Image"}} | (features or {})
    told = json.dumps({"info": {"features": described}})
    return table.replace_schema_metadata({"huggingface": told})


def write_parquet(path, table, rows=3):
    """Write a table in groups of a few rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def write_arrow(path, table, rows=3):
    """Write a table as a stream of batches, as `save_to_disk` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        for batch in table.to_batches(max_chunksize=rows):
            stream.write_batch(batch)
    return path
