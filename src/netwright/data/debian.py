"""Debian's package index as data: short descriptions, sections, and who depends on whom.

The index is what ``apt-cache dumpavail`` prints on a Debian machine, without any network. Nothing of it is shipped
with netwright: the Debian project publishes it with its archive, and a description belongs to its package and has that
package's licence (its ``debian/copyright``). What was read is kept in netwright's cache with the date of the index and
a SHA-256, so that an experiment can say which index it saw, and sees the same one again.
"""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import sparse

from netwright import storage
from netwright.console import UserError

LISTS = Path("/var/lib/apt/lists")
LEAST = 1000  # packages of an index; without lists apt knows the installed ones alone
_FIELD = re.compile(r"^(Package|Section|Description|Pre-Depends|Depends):(.*(?:\n[ \t].*)*)", re.MULTILINE)
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_WORD = re.compile(r"[a-z][a-z0-9+#.-]*[a-z0-9+#]")


@dataclass(frozen=True)
class Package:
    """One binary package.

    Attributes:
        name: Its name.
        section: What it is for, without the archive's area: ``"games"``.
        description: One line.
        depends: Names that ``Depends`` and ``Pre-Depends`` list, of alternatives the first, without versions.
    """

    name: str
    section: str
    description: str
    depends: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackageIndex:
    """The packages of an index, and which index it was.

    Attributes:
        packages: In the order of the index, each name once.
        date: Of the newest list that apt has, as YYYY-MM-DD.
        sha256: Of names, sections, descriptions and dependencies.
    """

    packages: tuple[Package, ...]
    date: str
    sha256: str

    def sections(self, count: int) -> list[str]:
        """The largest sections, the largest first; of equals the first in the alphabet.

        Raises:
            ValueError: If there are not so many.
        """
        sizes = Counter(package.section for package in self.packages)
        if not 1 <= count <= len(sizes):
            raise ValueError(f"count must lie in 1..{len(sizes)}, the number of sections, got {count}")
        return [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:count]]

    def edges(self) -> Int[np.ndarray, "2 dependencies"]:
        """(from, to) places in ``packages`` of all dependencies on packages of the index."""
        places = {package.name: place for place, package in enumerate(self.packages)}
        pairs = [
            (place, places[name])
            for place, package in enumerate(self.packages)
            for name in package.depends
            if name in places
        ]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2).T


def parse_packages(text: str) -> Iterator[Package]:
    """Packages from the text of an index; entries without name, section or description are passed over.

    Example:
        >>> text = "Package: 0ad\\nSection: games\\nDepends: libc6, awk | mawk\\nDescription: Ancient warfare\\n"
        >>> list(parse_packages(text))
        [Package(name='0ad', section='games', description='Ancient warfare', depends=('libc6', 'awk'))]
    """
    for entry in text.split("\n\n"):
        fields = dict(_FIELD.findall(entry))
        if {"Package", "Section", "Description"} <= set(fields):
            yield Package(
                fields["Package"].strip(),
                fields["Section"].strip().rpartition("/")[2],
                fields["Description"].partition("\n")[0].strip(),
                tuple(dict.fromkeys([*_names(fields.get("Pre-Depends", "")), *_names(fields.get("Depends", ""))])),
            )


def _names(field: str) -> list[str]:
    """The first alternative of each dependency, without version, architecture and restrictions."""
    return [found[0] for part in field.split(",") if (found := _NAME.search(part.partition("|")[0]))]


def absent() -> str | None:
    """Why there is no index on this machine, or None where there is one (or one is in the cache).

    Example:
        >>> absent() is None or "apt" in absent()
        True
    """
    if cached().is_file():
        return None
    if shutil.which("apt-cache") is None:
        return "apt-cache is not installed: no Debian machine"
    if not any(LISTS.glob("*_Packages*")):
        return f"apt has no lists in {LISTS}: apt-get update fetches them"
    return None


def load_packages() -> PackageIndex:
    """The index of this machine; once read it comes from the cache.

    Raises:
        UserError: If there is none, or the cached copy is damaged.
    """
    path = cached()
    if path.is_file():
        return _from_cache(path)
    reason = absent()
    if reason is not None:
        raise UserError("there is no Debian package index", cure=f"mind that {reason}")
    done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=False)
    if done.returncode != 0:
        told = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"apt-cache dumpavail failed: {told[-1] if told else done.returncode}")
    index = make_index(done.stdout.decode("utf-8", errors="replace"), _date())
    if len(index.packages) < LEAST:
        raise UserError(f"the package index has {len(index.packages)} packages, too few", cure="run apt-get update")
    storage.write_json(path, asdict(index))
    return index


def make_index(text: str, date: str) -> PackageIndex:
    """An index from its text; of packages of one name the first counts.

    Args:
        text: As ``apt-cache dumpavail`` prints it.
        date: Of the index, as YYYY-MM-DD.
    """
    known: dict[str, Package] = {}
    for package in parse_packages(text):
        known.setdefault(package.name, package)
    packages = tuple(known.values())
    return PackageIndex(packages, date, storage.digest([asdict(package) for package in packages]))


def cached() -> Path:
    """Where the index lies once it was read."""
    return storage.cache_home() / "debian" / "packages.json"


def _date() -> str:
    newest = max(file.stat().st_mtime for file in LISTS.glob("*_Packages*"))
    return datetime.datetime.fromtimestamp(newest, datetime.UTC).date().isoformat()


def _from_cache(path: Path) -> PackageIndex:
    try:
        found = storage.read_json(path)
        rows = [{**row, "depends": tuple(row["depends"])} for row in found["packages"]]
        packages = tuple(Package(**row) for row in rows)
        if storage.digest([asdict(package) for package in packages]) != found["sha256"]:
            raise ValueError("its SHA-256 is another")
        return PackageIndex(packages, found["date"], found["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("damaged package index", where=path, cure="delete it") from error


def words(text: str) -> set[str]:
    """The words of a line, in lower case: at least two characters, the first one a letter.

    Example:
        >>> sorted(words("C++ library, for A/V (libav-tools 2.0)"))
        ['c++', 'for', 'libav-tools', 'library']
    """
    return set(_WORD.findall(text.lower()))


def bag_of_words(texts: Sequence[str], most: int, least_count: int = 2) -> tuple[Any, tuple[str, ...]]:
    """Which words occur in which lines.

    Args:
        texts: Lines.
        most: Words at most: those in the most lines, of equals the first in the alphabet.
        least_count: Lines that a word is in at least.

    Returns:
        A binary float32 CSR array (lines, words), and the words.

    Raises:
        ValueError: If no word is left, or a number is below 1.

    Example:
        >>> X, found = bag_of_words(["a red car", "the red bus"], most=5)
        >>> X.toarray().tolist(), found
        ([[1.0], [1.0]], ('red',))
    """
    for name, value in (("most", most), ("least_count", least_count)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    each = [sorted(words(text)) for text in texts]
    counts = Counter(word for line in each for word in line)
    common = sorted((word for word in counts if counts[word] >= least_count), key=lambda word: (-counts[word], word))
    kept = tuple(common[:most])
    if not kept:
        raise ValueError(f"texts must share words, got none that is in {least_count} of {len(texts)} lines")
    places = {word: place for place, word in enumerate(kept)}
    columns = [[places[word] for word in line if word in places] for line in each]
    # SciPy would take 64 bits for places, which scikit-learn's trees refuse.
    starts = np.cumsum([0, *map(len, columns)], dtype=np.int32)
    flat = np.fromiter((c for line in columns for c in line), dtype=np.int32)
    X = sparse.csr_array((np.ones(len(flat), np.float32), flat, starts), shape=(len(texts), len(kept)))
    X.sort_indices()
    return X, kept
