"""Folders of an export: whole or not at all, with a manifest, and never in place of other files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import recformer
from recformer.files import UserError, atomic_folder, read_json, write_json

MANIFEST = "manifest.json"
KIND = "recformer export"


def check_target(folder: Path) -> None:
    """Refuse a folder that an export would take the place of, unless it is an older export.

    Raises:
        UserError: there are other files, or a file in its place.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder to write to")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    manifest = folder / MANIFEST
    found = read_json(manifest) if manifest.is_file() else None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(
            f"{folder} holds files that are no export, and an export takes the place of the whole "
            "folder: name another --output_dir"
        )


@contextmanager
def exported_folder(folder: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """A new folder to fill; with its manifest it takes the place of `folder` at the end.

    Args:
        manifest: what it says beside the names, sizes and SHA-256 of the files; read at the end,
            so what is found on the way may still be put into it.

    Raises:
        UserError: as `check_target`.
    """
    check_target(folder)
    with atomic_folder(folder) as partial:
        yield partial
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            for path in sorted(partial.iterdir())
        }
        head = {"kind": KIND, "recformer": recformer.__version__}
        write_json(partial / MANIFEST, head | manifest | {"files": files}, indent=2)


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
