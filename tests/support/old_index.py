"""Turns a set's index back into format 1, as every version before format 2 wrote it."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from shards.files import write_whole
from shards.manifest import INDEX, SIDECAR_1, Manifest, sidecar_dtype


def as_format_1(folder: Path) -> Path:
    new = Manifest.open(folder)
    rows = np.empty(new.samples, sidecar_dtype(new.key_bytes, 1))
    for name in rows.dtype.names:
        rows[name] = new.sidecar[name]
    document = new.document()
    document |= {
        "format": 1,
        "sidecar": asdict(write_whole(folder / SIDECAR_1, rows.tobytes())),
        "digest": document.pop("format_1_digest"),
    }
    (folder / INDEX).write_text(json.dumps(document))
    (folder / new.sidecar_file.name).unlink()
    return folder
