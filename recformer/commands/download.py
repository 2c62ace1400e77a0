"""Public data sets: Amazon reviews and MovieLens.

A download that was cut off goes on; sizes and checksums are verified. The last line printed is the
command that turns the files into a processed folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recformer.cli import command_parser
from recformer.preparation.download import (
    AMAZON,
    MOVIELENS,
    SESSION_LOGS,
    download,
    remote_files,
    unpack_movielens,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, fetch, say what was written and what to do with it."""
    parser = command_parser("download", __doc__)
    parser.add_argument(
        "name", metavar="NAME", help=f"{', '.join(f'{y}/CATEGORY' for y in AMAZON)}, "
        f"{', '.join((*MOVIELENS, *SESSION_LOGS))}"
    )  # fmt: skip
    parser.add_argument(
        "--output_path", default="raw_data", metavar="FOLDER", help="folder for the files"
    )
    args = parser.parse_args(arguments)
    files, page = remote_files(args.name)
    folder = Path(args.output_path)
    log = SESSION_LOGS.get(args.name)
    if log is not None:
        print(f"{args.name}: {log.terms}; {log.page}")
    paths = [download(file, folder, page) for file in files]
    if log is not None:
        if log.unpack is not None:
            print(log.unpack.format(folder=folder))
        print(
            f"recformer process --file_path {folder / log.log} {log.flags} "
            f"--output_path {folder / args.name}_processed"
        )
        return
    if args.name in MOVIELENS:
        paths = unpack_movielens(paths[0])
    print(
        f"recformer process --file_path {paths[0]} --meta_file_path {paths[1]} "
        f"--output_path {folder / args.name.replace('/', '-')}_processed"
    )
