"""Where the volumes of a data set lie: BraTS, IXI, plain folders, a JSON datalist (docs/data.md, layouts).

Every reader turns a folder into ``{subject: {contrast: path}}`` with one set of contrast names, whatever the data
set calls them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

Subjects = dict[str, dict[str, Path]]

# What data sets call the contrasts, and what we call them. A name that is not here stands for itself.
CONTRAST_NAMES = {"t1n": "t1", "t1ce": "t1c", "t2w": "t2", "t2f": "flair"}
CONTRASTS = ("t1", "t1c", "t2", "flair", "pd")  # what is an image of the subject, and no label or mask
LAYOUT_PATTERNS = {
    "brats2021": "<subject>/<subject>_{t1,t1ce,t2,flair,seg}.nii.gz",
    "brats2023": "<subject>/<subject>-{t1n,t1c,t2w,t2f,seg}.nii.gz",
    "ixi": "IXI-T2/<subject>-T2.nii.gz beside IXI-PD/<subject>-PD.nii.gz",
    "plain": "<subject>/{t1,t2,pd,flair,seg}.nii.gz",
}


def contrast_name(name: str) -> str:
    """Our name of a contrast: ``T1CE`` is ``t1c``, ``t2w`` is ``t2``."""
    return CONTRAST_NAMES.get(name.lower(), name.lower())


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def _nifti_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if re.search(r"\.nii(\.gz)?$", p.name) and not p.name.startswith("."))


def _brats(root: Path, separator: str, contrasts: str) -> Subjects:
    subjects: Subjects = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        for path in _nifti_files(folder):
            found = re.fullmatch(re.escape(folder.name + separator) + f"({contrasts})", _stem(path))
            if found:
                subjects.setdefault(folder.name, {})[contrast_name(found.group(1))] = path
    return subjects


def _brats2021(root: Path) -> Subjects:
    return _brats(root, "_", "t1|t1ce|t2|flair|seg")


def _brats2023(root: Path) -> Subjects:
    return _brats(root, "-", "t1n|t1c|t2w|t2f|seg")


def _ixi(root: Path) -> Subjects:
    subjects: Subjects = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and re.fullmatch(r"IXI-(T1|T2|PD)", p.name)):
        for path in _nifti_files(folder):
            found = re.fullmatch(r"(IXI\d+-.+)-(T1|T2|PD)", _stem(path))
            if found:
                subjects.setdefault(found.group(1), {})[contrast_name(found.group(2))] = path
    return subjects


def _plain(root: Path) -> Subjects:
    subjects: Subjects = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "IXI-"))):
        for path in _nifti_files(folder):
            if not _stem(path).startswith(folder.name):
                subjects.setdefault(folder.name, {})[contrast_name(_stem(path))] = path
    return subjects


LAYOUTS: dict[str, Callable[[Path], Subjects]] = {
    "brats2021": _brats2021,
    "brats2023": _brats2023,
    "ixi": _ixi,
    "plain": _plain,
}


def find_subjects(dataset_dir: str | os.PathLike[str], layout: str = "auto") -> tuple[str, Subjects]:
    """Find the subjects of a data set folder.

    Args:
        dataset_dir: the folder.
        layout: "brats2021", "brats2023", "ixi", "plain", or "auto": the one under which most files are found.

    Returns:
        The layout and ``{subject: {contrast: path}}``.

    Raises:
        FileNotFoundError: the folder is missing, or holds nothing of that layout.
        ValueError: the layout is unknown.
    """
    root = Path(dataset_dir).expanduser()
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; known are auto, {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir {root}: there is no such folder")
    candidates = {name: LAYOUTS[name](root) for name in ([layout] if layout != "auto" else LAYOUTS)}
    best = max(candidates, key=lambda name: sum(map(len, candidates[name].values())))
    if not candidates[best]:
        patterns = "\n".join(f"  {name}: {LAYOUT_PATTERNS[name]}" for name in candidates)
        raise FileNotFoundError(f"dataset_dir {root}: no subject found; expected files are\n{patterns}")
    return best, candidates[best]


def read_json_datalist(path: Path) -> dict[str, Subjects]:
    """Read a MONAI / Decathlon datalist: ``{"training": [{...}], "validation": [{...}]}``.

    An item maps contrasts to paths (``{"t2": ..., "t1": ...}``), relative to the JSON file, or has ``target`` and
    ``reference``, or the Decathlon keys ``image`` (the reference) and ``label`` (the target). ``subject`` names it;
    otherwise the folder and file name of its first path do.

    Returns:
        ``{"training": subjects, "validation": subjects}``, the sections that are there.

    Raises:
        ValueError: it is not such a file, or two of its items have one name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"datalist {path}: cannot be read as JSON ({error})") from error
    sections: dict[str, Subjects] = {}
    for section in ("training", "validation", "test", "testing"):
        items = content.get(section, []) if isinstance(content, dict) else []
        for item in items:
            images = {
                {"image": "reference", "label": "target"}.get(key, contrast_name(key)): path.parent / str(value)
                for key, value in (item.items() if isinstance(item, dict) else ())
                if key not in ("subject", "fold") and isinstance(value, str)
            }
            if len(images) < 2:
                if section.startswith("test"):
                    continue  # Decathlon's test images have no counterpart, often they are bare paths
                raise ValueError(
                    f"datalist {path}: section {section!r} has the item {item!r}; "
                    "expected an object that maps at least two contrasts to paths"
                )
            first = next(iter(images.values()))
            name = str(item.get("subject") or f"{first.parent.name}_{_stem(first)}")
            if name in sections.setdefault(section, {}):
                raise ValueError(
                    f"datalist {path}: section {section!r} has two items of the name {name}; "
                    'tell them apart with the key "subject"'
                )
            sections[section][name] = images
    if not sections:
        raise ValueError(f'datalist {path}: expected {{"training": [...], "validation": [...]}} with at least one item')
    return sections
