"""Write the repository's address everywhere, once it is known.

    python scripts/set_repository.py OWNER/NAME

``[project.urls]`` in pyproject.toml holds the address; README, CITATION.cff, _config.yml and the notebooks'
badges and set-up cells repeat it, and a test fails when they disagree.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# GitHub's own rule: an owner is letters, digits and single inner hyphens; a name also takes dots and
# underscores.
SLUG = re.compile(r"(?P<owner>[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)/(?P<name>[A-Za-z0-9._-]+)")


def files(root: Path) -> list[Path]:
    """Every file that may carry the address."""
    return [
        root / "pyproject.toml",
        root / "README.md",
        root / "CITATION.cff",
        root / "_config.yml",
        *sorted((root / "notebooks").glob("*.ipynb")),
        *sorted((root / "book").glob("*.md")),
    ]


def current(root: Path) -> str:
    """OWNER/NAME as pyproject.toml has it."""
    url = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"][
        "Repository"
    ]
    return url.removeprefix("https://github.com/")


def rewrite(text: str, old: str, new: str) -> str:
    """Replace the repository's and the site's address, and nothing that merely starts like them."""
    (old_owner, old_name), (new_owner, new_name) = old.split("/"), new.split("/")
    end = r"(?![A-Za-z0-9_-]|\.[A-Za-z0-9])"
    text = re.sub(rf"(github(?:\.com)?/){re.escape(old)}{end}", rf"\g<1>{new}", text)
    return re.sub(
        rf"https://{re.escape(old_owner)}\.github\.io/{re.escape(old_name)}{end}",
        f"https://{new_owner}.github.io/{new_name}",
        text,
    )


def set_repository(root: Path, new: str) -> list[Path]:
    """Rewrite the files that change, and return them.

    Raises:
        ValueError: ``new`` is not OWNER/NAME; nothing is written.
    """
    if not SLUG.fullmatch(new) or new.endswith((".git", "/.", "/..")):
        raise ValueError(f"the repository must be OWNER/NAME, got {new!r}")
    old = current(root)
    changed = []
    # pyproject.toml goes last: were the run cut short, the next one would still know what to look for.
    for path in sorted(files(root), key=lambda path: path.name == "pyproject.toml"):
        before = path.read_text(encoding="utf-8")
        after = rewrite(before, old, new)
        if after != before:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(after, encoding="utf-8")
            os.replace(temporary, path)
            changed.append(path)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", metavar="OWNER/NAME")
    try:
        changed = set_repository(ROOT, parser.parse_args().repository)
    except ValueError as error:
        parser.error(str(error))
    for path in changed:
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
