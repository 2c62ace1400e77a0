"""Fetch a public data set: `recformer download NAME --output_path FOLDER`.

NAME is amazon-2014/CATEGORY, amazon-2018/CATEGORY, amazon-2023/CATEGORY, a MovieLens set, rees46 or
yoochoose. A run that was cut off goes on where it stopped. A file takes its name once it is whole,
and right where its checksum is known; publishers give none for Amazon's files and the logs of
sessions, of those only the size is checked.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

from recformer.files import UserError, atomic_write, lock, naming

_CHUNK = 1 << 16  # of a piece that breaks off nothing is kept
_TIMEOUT = (20, 60)  # seconds to connect, and between two pieces

_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data"
_SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch.

    Attributes:
        url: where it is.
        sha256: of its content, hex; None where unknown.
    """

    url: str
    sha256: str | None = None

    @property
    def name(self) -> str:
        """File name on this machine."""
        return self.url.rpartition("/")[2]


# {year: (addresses of reviews and metadata, page to look at when the host is gone)}
AMAZON = {
    "amazon-2014": (
        (f"{_SNAP}/reviews_{{}}_5.json.gz", f"{_SNAP}/meta_{{}}.json.gz"),
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
    ),
    "amazon-2018": (
        (
            f"{_UCSD}/amazon_v2/categoryFilesSmall/{{}}_5.json.gz",
            f"{_UCSD}/amazon_v2/metaFiles2/meta_{{}}.json.gz",
        ),
        "https://nijianmo.github.io/amazon/",
    ),
    "amazon-2023": (
        (
            f"{_UCSD}/amazon_2023/raw/review_categories/{{}}.jsonl.gz",
            f"{_UCSD}/amazon_2023/raw/meta_categories/meta_{{}}.jsonl.gz",
        ),
        "https://amazon-reviews-2023.github.io/",
    ),
}

# SHA-256 as recorded by TensorFlow Datasets (url_checksums/movielens.txt) where it has them.
MOVIELENS = {
    "ml-100k": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    "ml-1m": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    "ml-10m": "813c411ccb6122564edfe752e7f80c4dcc5aa25fa94c93622f6877a7ba252862",
    "ml-20m": "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
    "ml-25m": "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
    "ml-latest-small": None,  # GroupLens renews it from time to time
}


@dataclass(frozen=True)
class SessionLog:
    """A public log of sessions.

    Attributes:
        url: of its file; no checksum is published.
        page: describes it.
        terms: of use.
        unpack: the command that unpacks it; None: it is read as it is.
        log: name of the log, once unpacked.
        flags: of `recformer process`.
    """

    url: str
    page: str
    terms: str
    unpack: str | None
    log: str
    flags: str


_REES46 = SessionLog(
    url="https://data.rees46.com/datasets/marketplace/2019-Oct.csv.gz",
    page="https://www.kaggle.com/datasets/mkechinov/"
    "ecommerce-behavior-data-from-multi-category-store",
    terms="free to use where its source is named (REES46 Marketing Platform)",
    unpack=None,
    log="2019-Oct.csv.gz",
    flags="--protocol t4rec_rees46 --session_column user_session",
)
SESSION_LOGS = {
    "rees46": _REES46,
    "yoochoose": SessionLog(
        url="https://s3-eu-west-1.amazonaws.com/yc-rdata/yoochoose-data.7z",
        page="https://www.kaggle.com/datasets/chadgostopp/recsys-challenge-2015",
        terms="CC BY-NC-ND 4.0",
        unpack="7z x {folder}/yoochoose-data.7z -o{folder} yoochoose-clicks.dat",
        log="yoochoose-clicks.dat",
        flags="--protocol t4rec_yoochoose --session_column 1 --time_column 2 --item_column 3",
    ),
}
_COLUMNS = {
    "ratings": ["userId", "movieId", "rating", "timestamp"],
    "movies": ["movieId", "title", "genres"],
}
MOVIELENS_PAGE = "https://grouplens.org/datasets/movielens/"


def remote_files(name: str) -> tuple[list[RemoteFile], str]:
    """The files of a data set and the page that describes it.

    Raises:
        UserError: no such data set; those known are listed.
    """
    year, _, category = name.partition("/")
    if year in AMAZON and category:
        addresses, page = AMAZON[year]
        return [RemoteFile(address.format(category)) for address in addresses], page
    if name in MOVIELENS:
        return [RemoteFile(f"{_GROUPLENS}/{name}.zip", MOVIELENS[name])], MOVIELENS_PAGE
    if name in SESSION_LOGS:
        return [RemoteFile(SESSION_LOGS[name].url)], SESSION_LOGS[name].page
    known = [*(f"{year}/CATEGORY" for year in AMAZON), *MOVIELENS, *SESSION_LOGS]
    raise UserError(
        f"got {name!r}, expected one of {', '.join(known)}; a category is written as in the file "
        f"names of the publisher's page (Industrial_and_Scientific, Gift_Cards, …)"
    )


def download(file: RemoteFile, folder: str | os.PathLike, page: str) -> Path:
    """Fetch a file, going on where an earlier run stopped; one that is there is kept.

    Args:
        file: what to fetch.
        folder: where to, created where missing.
        page: named in errors as the place to look by hand.

    Raises:
        UserError: the host does not answer or has no such file, or what came is cut off or not
            what the checksum says. What came of a cut-off file is kept for the next run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / file.name, folder / f"{file.name}.partial"
    version = folder / f"{file.name}.version.partial"
    if path.is_file():
        _check(file, path, page)
        return path
    by_hand = (
        f"look on {page} for where the file is now, put it by hand into {folder} as {file.name} "
        f"and give the command again"
    )
    try:
        _fetch(file.url, partial, version)
    except requests.HTTPError as error:
        raise UserError(f"{file.url} answered {error.response.status_code}: {by_hand}") from error
    except requests.RequestException as error:
        raise UserError(
            f"{file.url} broke off or cannot be reached ({type(error).__name__}): give the command "
            f"again to go on where it stopped, or {by_hand}"
        ) from error
    _check(file, partial, page)
    os.replace(partial, path)
    version.unlink(missing_ok=True)
    return path


def _fetch(url: str, partial: Path, version: Path) -> None:
    """Fetch into `partial`; the version tag of what is in it stands in `version`."""
    have = partial.stat().st_size if partial.is_file() else 0
    tag = version.read_text() if version.is_file() else ""
    # Without compression on the way, sizes and places are those of the file.
    headers = {"Accept-Encoding": "identity"}
    if have and tag:
        # If-Range: the rest of that very version, or all of another one.
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == 416:  # nothing is behind what is there: begin anew
            partial.unlink()
            version.unlink()
            _fetch(url, partial, version)
            return
        response.raise_for_status()
        goes_on = response.status_code == 206
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise requests.ConnectionError("the host sent another part than asked for")
        start = have if goes_on else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        tag = response.headers.get("ETag", "")
        with (
            naming(partial),
            open(partial, "ab") as handle,
            tqdm(
                total=total, initial=start, desc=partial.name.removesuffix(".partial"),
                unit="B", unit_scale=True, disable=None,
            ) as bar,
        ):  # fmt: skip
            if not lock(handle.fileno()):
                raise UserError(f"another process is fetching {partial}: wait for its end")
            if not goes_on:
                handle.truncate(0)
            # A weak tag stands for more than one content, a missing one for any.
            version.write_text(
                "" if tag.startswith("W/") else tag or response.headers.get("Last-Modified", "")
            )
            for piece in response.iter_content(_CHUNK):
                handle.write(piece)
                bar.update(len(piece))
            handle.flush()
            os.fsync(handle.fileno())
    if total is not None and partial.stat().st_size != total:
        raise requests.ConnectionError(f"{partial.stat().st_size} of {total} bytes came")


def _check(file: RemoteFile, path: Path, page: str) -> None:
    if file.sha256 is None:
        return
    with open(path, "rb") as handle:
        digest = hashlib.sha256()
        while piece := handle.read(_CHUNK):
            digest.update(piece)
    if digest.hexdigest() != file.sha256:
        if path.name.endswith(".partial"):
            path.unlink()  # it would be gone on with
        raise UserError(
            f"{path} has the SHA-256 {digest.hexdigest()}, expected {file.sha256}: delete it if it "
            f"is there and fetch it again; if it comes out the same, see {page}"
        )


def unpack_movielens(archive: str | os.PathLike) -> list[Path]:
    """ratings.csv and movies.csv beside the archive, as the newer sets have them.

    The older ones are rewritten: `::` between fields, Latin-1 (ML-10M is UTF-8), and in ML-100K a
    column of 0 or 1 for every genre.

    Raises:
        UserError: the archive is damaged or lacks the two files.
    """
    archive = Path(archive)
    written = []
    try:
        with zipfile.ZipFile(archive) as files:
            names = {Path(name).name: name for name in files.namelist()}
            for name, header in _COLUMNS.items():
                target = archive.parent / archive.stem / f"{name}.csv"
                if f"{name}.csv" in names:
                    with (
                        files.open(names[f"{name}.csv"]) as source,
                        atomic_write(target, "wb") as handle,
                    ):
                        while piece := source.read(_CHUNK):
                            handle.write(piece)
                elif f"{name}.dat" in names or "u.data" in names:
                    with atomic_write(target) as handle:
                        rows = csv.writer(handle, lineterminator="\n")
                        rows.writerow(header)
                        rows.writerows(_old_rows(files, names, name))
                else:
                    raise UserError(f"{archive} holds no {name}.csv or {name}.dat")
                written.append(target)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is damaged ({error}): delete it and fetch it again") from error
    return written


def _old_rows(files: zipfile.ZipFile, names: dict[str, str], name: str) -> Iterator[list[str]]:
    """Ratings or movies of ML-100K, ML-1M or ML-10M; `names` finds a file in the archive."""

    def lines(file: str, encoding: str = "latin-1") -> Iterator[str]:
        with files.open(names[file]) as source:
            for line in io.TextIOWrapper(source, encoding=encoding):
                if line.strip():
                    yield line.rstrip("\r\n")

    if f"{name}.dat" in names:
        ten_million = names[f"{name}.dat"].startswith("ml-10M")
        for line in lines(f"{name}.dat", "utf-8" if ten_million else "latin-1"):
            yield line.split("::")
    elif name == "ratings":
        for line in lines("u.data"):
            yield line.split("\t")
    else:
        genres = [line.split("|")[0] for line in lines("u.genre")]
        for line in lines("u.item"):
            movie, title, _, _, _, *flags = line.split("|")
            yield [movie, title, "|".join(g for g, flag in zip(genres, flags) if flag == "1")]
