"""Say what this interpreter lacks of pyproject.toml: `check_environment.py [EXTRA ...]`.

Prints one line a missing or wrong package and exits 1, or nothing and exits 0. Only looks at
installed metadata: nothing is imported, so it takes a fraction of a second.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

try:  # tomllib is in Python from 3.11 on; pip carries a copy of both for a bare 3.10
    import tomllib
except ModuleNotFoundError:
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]
try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[no-redef,assignment]


def missing(requirements: list[str], extras: dict[str, list[str]], own_name: str) -> list[str]:
    """The requirements that the installed packages do not meet, with what was found instead."""
    found = []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if requirement.name == own_name:  # an extra that includes another one
            for extra in sorted(requirement.extras):
                found += missing(extras[extra], extras, own_name)
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"{line}: not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{line}: {version} is installed")
    return found


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = list(project["dependencies"])
    for extra in sys.argv[1:]:
        wanted += extras[extra]
    lines = missing(wanted, extras, project["name"])
    if lines:
        print("\n".join(lines))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
