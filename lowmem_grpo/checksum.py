"""Whether files and documents are what was written: sha256 of files, and JSON objects that carry
their own.

A checksum tells damage, not malice: whoever can write a file can write its checksum.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import DamageError
from lowmem_grpo.plain_json import parse_json

__all__ = ["checksums", "damage", "read_sealed", "sealed", "sha256_of", "unsealed"]

SEAL = "sha256"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def checksums(directory: Path) -> dict[str, str]:
    """Of every file of a directory, by its name."""
    return {path.name: sha256_of(path) for path in sorted(directory.iterdir())}


def damage(directory: Path, expected: Mapping[str, str]) -> str | None:
    """What is wrong with the files of a directory, in words; None where all are as `expected`."""
    for name, digest in expected.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if sha256_of(path) != digest:
                return f"{name} is not what was written (its sha256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def sealed(document: Mapping[str, Any]) -> str:
    """A JSON object, as one line, with the sha256 of its text as a first key. Raises ValueError for
    what JSON has not.
    """
    text = json.dumps(document, allow_nan=False)
    return f'{{"{SEAL}": "{_sha256(text)}"{", " if document else ""}{text[1:]}'


def unsealed(text: str) -> dict[str, Any]:
    """What was `sealed`. Raises ValueError, in words, for what is none or has changed."""
    document = parse_json(text)
    if not isinstance(document, dict) or not isinstance(document.get(SEAL), str):
        raise ValueError("it has no checksum")
    expected = document.pop(SEAL)
    if _sha256(json.dumps(document)) != expected:
        raise ValueError("it is not what was written (its sha256 differs)")
    return document


def read_sealed(path: Path, way_out: str) -> dict[str, Any]:
    """A sealed document that lies beside the files of which it has the checksums, in "files".
    Raises DamageError, with the way out, where any of them is not what was written.
    """
    try:
        document = unsealed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DamageError(f"{path}: {reason}; {way_out}") from error
    if problem := damage(path.parent, document["files"]):
        raise DamageError(f"{path.parent}: {problem}; {way_out}")
    return document


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
