"""Which volumes are trained on and which are held out: pairs of target and reference, split by patient."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from glmamba_monai.data.layouts import CONTRASTS, Subjects, contrast_name, find_subjects, read_json_datalist
from glmamba_monai.data.phantom import demo_data
from glmamba_monai.files import write_json
from glmamba_monai.formats import file_format, require_readable
from glmamba_monai.transforms.grid import Grid, require_same_grid, slice_axes
from glmamba_monai.transforms.pair import open_pair, volume_name

logger = logging.getLogger(__name__)

Item = dict[str, str]
Datalist = dict[str, Any]  # "training" and "validation", lists of items, and what the split was "made_with"
DATALIST_FILE = "datalist.json"
VALIDATION_FRACTION = 0.2  # the paper's share on IXI: 92 of 460


def dataset_or_demo(dataset_dir: str | os.PathLike[str] | None) -> str:
    """The data set folder, or where none is given, the embedded phantom (made and cached at first use)."""
    if dataset_dir is not None:
        return str(dataset_dir)
    folder = demo_data()
    logger.warning(
        "No dataset_dir is given: using the embedded SYNTHETIC brain phantom in %s. It shows that the chain works; "
        "weights trained on it are not for real scans.",
        folder,
    )
    return str(folder)


def patient_of(subject: str) -> str:
    """The patient whom a subject folder belongs to, so that two scans of one patient are never split.

    ``BraTS-GLI-00012-001`` (second time point) belongs to ``BraTS-GLI-00012``, ``patient01_study2`` and the
    ``patient01_study2_t2`` of a JSON datalist to ``patient01``; any other name is a patient of its own.
    """
    found = re.match(r"(.*?BraTS-[A-Za-z]+-\d+)-\d+|(.+?)[_-](?:study|session|ses|visit|time)-?\d+", subject)
    return next(filter(None, found.groups())) if found else subject


def split_subjects(
    subjects: Sequence[str], validation: float | Sequence[str] = VALIDATION_FRACTION, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split subjects into training and validation, patient by patient.

    Args:
        subjects: subject names, in any order.
        validation: the fraction of patients to hold out (at least one), or the names of the subjects to hold out;
            other scans of their patients are held out with them.
        seed: of the shuffle. The same names and seed give the same split.

    Returns:
        Sorted names for training and for validation, neither empty.

    Raises:
        ValueError: a named subject is not there or none is named, the fraction is not in (0, 1), or there are too few
            patients.
    """
    patients = sorted({patient_of(s) for s in subjects})
    if isinstance(validation, (int, float)):
        if not 0 < validation < 1:
            raise ValueError(f"validation must be a fraction between 0 and 1 or a list of subjects, got {validation}")
        shuffled = list(np.random.RandomState(seed).permutation(patients))
        held_out = set(shuffled[: max(1, round(validation * len(patients)))])
    else:
        named = [validation] if isinstance(validation, str) else list(validation)
        if not named:
            raise ValueError("validation is an empty list; name at least one subject to hold out, or a fraction")
        unknown = sorted(set(named) - set(subjects) - set(patients))
        if unknown:
            raise ValueError(f"validation names {', '.join(unknown)}; the subjects are {', '.join(sorted(subjects))}")
        held_out = {patient_of(s) for s in named}
    training = sorted(s for s in subjects if patient_of(s) not in held_out)
    if not training:
        raise ValueError(
            f"{len(patients)} patient(s) found ({', '.join(patients)}) and {len(held_out)} held out: "
            "training needs at least one more patient"
        )
    return training, sorted(s for s in subjects if patient_of(s) in held_out)


def pair_contrasts(subjects: Subjects, target: str, reference: str, skip_incomplete: bool) -> list[Item]:
    """Turn ``{subject: {contrast: path}}`` into items ``{"subject", "target", "reference"[, "seg"]}``.

    Args:
        subjects: what a layout reader found.
        target: contrast to super-resolve.
        reference: contrast that guides.
        skip_incomplete: leave out, with a warning, subjects that lack one of the two; else they are an error.

    Raises:
        ValueError: the contrasts are the same, or no subject has them.
        FileNotFoundError: a subject lacks one of them and ``skip_incomplete`` is false, or a file is missing.
    """
    wanted = {"target": contrast_name(target), "reference": contrast_name(reference)}
    if wanted["target"] == wanted["reference"]:
        raise ValueError(f"target and reference are both {target!r}; they must be two contrasts of the same subject")
    present = sorted({c for images in subjects.values() for c in images})
    items: list[Item] = []
    left_out: list[str] = []
    for subject, images in sorted(subjects.items()):
        # A datalist may name the roles themselves instead of contrasts.
        found = {role: images.get(contrast, images.get(role)) for role, contrast in wanted.items()}
        missing = [f"{role} ({wanted[role]})" for role, path in found.items() if path is None]
        if missing:
            message = f"subject {subject} has no {' and no '.join(missing)}; it has {', '.join(sorted(images))}"
            if not skip_incomplete:
                raise FileNotFoundError(message)
            left_out.append(message)
            continue
        item = {"subject": subject, **{role: str(path) for role, path in found.items()}}
        if "seg" in images:
            item["seg"] = str(images["seg"])
        items.append(item)
    if not items:
        raise ValueError(
            f"no subject has both target {wanted['target']!r} and reference {wanted['reference']!r}; "
            f"the contrasts found are {', '.join(present)}"
        )
    for message in left_out:
        logger.warning("%s: left out", message)
    return items


def require_volume_file(path: str | os.PathLike[str]) -> nib.spatialimages.SpatialImage:
    """Open a NIfTI file (its header only) and make sure that it holds one volume.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not NIfTI, or not three-dimensional.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises what the layer below happens to raise
        raise ValueError(f"{path}: cannot be read as NIfTI ({error}); copy or convert it again") from error
    if len(image.shape) != 3:
        raise ValueError(
            f"{path}: expected one 3-D volume, found the shape {tuple(image.shape)}; extract a single volume from it"
        )
    return image


def require_paired_grids(items: Sequence[Item]) -> None:
    """Check, from the headers alone, that target and reference of every item lie on one grid.

    Raises:
        FileNotFoundError, ValueError: naming the file, what was found and what was expected.
    """
    for item in items:
        require_same_grid(_grid_of(item["target"]), _grid_of(item["reference"]))


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def find_items(
    dataset_dir: str | os.PathLike[str],
    target: str,
    reference: str,
    layout: str = "auto",
    skip_incomplete: bool = True,
) -> tuple[Datalist, bool]:
    """Find all pairs of a data set: a folder in one of the layouts, or a JSON datalist.

    The arguments are those of :func:`prepare_datalist` and :func:`pair_contrasts`.

    Returns:
        ``{"training": items, "validation": items, "test": items}`` and whether the data set itself says whom to
        validate on (otherwise all but a stated test section stand under "training").

    Raises:
        ValueError: a datalist has one patient in two sections, and what the readers raise.
    """
    path = _absolute(dataset_dir)
    if path.suffix == ".json":
        sections = read_json_datalist(path)
        sections["test"] = {**sections.get("test", {}), **sections.pop("testing", {})}
        datalist = {
            name: pair_contrasts(sections[name], target, reference, skip_incomplete) if sections.get(name) else []
            for name in ("training", "validation", "test")
        }
        patients = {name: {patient_of(item["subject"]) for item in items} for name, items in datalist.items()}
        for one, other in combinations(patients, 2):
            shared = sorted(patients[one] & patients[other])
            if shared:
                raise ValueError(f"datalist {path}: {', '.join(shared)} stand(s) both in {one!r} and in {other!r}")
        return datalist, bool(datalist["validation"])
    layout, subjects = find_subjects(path, layout)
    if layout == "ixi" and "t1" in (contrast_name(target), contrast_name(reference)):
        raise ValueError(
            "IXI's T1 lies on another grid than its T2 and PD (it is a separate 3-D acquisition) and would have to be "
            "registered first; use --target t2 --reference pd"
        )
    items = pair_contrasts(subjects, target, reference, skip_incomplete)
    return {"training": items, "validation": [], "test": []}, False


def prepare_datalist(
    dataset_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    target: str,
    reference: str,
    layout: str = "auto",
    validation: float | Sequence[str] = VALIDATION_FRACTION,
    seed: int = 0,
    keep_split: bool = False,
) -> Datalist:
    """Find the pairs of a data set, check them and split them by patient; :func:`write_datalist` writes the split down.

    Args:
        dataset_dir: folder in one of the layouts, or a JSON datalist (whose split, if it has one, is kept).
        output_dir: folder of the results, where the split of an earlier run may stand.
        target: contrast to super-resolve.
        reference: contrast that guides.
        layout: see :func:`~glmamba_monai.data.layouts.find_subjects`.
        validation: see :func:`split_subjects`.
        seed: of the split.
        keep_split: use the split that stands in ``output_dir`` if it is of the same subjects and contrasts, whatever
            ``validation`` and ``seed`` are now: an evaluation or a resumed training must hold out the patients that the
            training has held out.

    Returns:
        ``{"made_with": arguments, "training": items, "validation": items}``; an item is
        ``{"subject", "target", "reference"[, "seg"]}``.

    Raises:
        FileNotFoundError, ValueError: see the functions this one calls.
    """
    made_with: dict[str, Any] = {
        "dataset_dir": str(_absolute(dataset_dir)),
        "target": contrast_name(target),
        "reference": contrast_name(reference),
        "layout": layout,
        "validation": validation if isinstance(validation, (int, float, str)) else list(validation),
        "seed": seed,
    }
    datalist, split = find_items(dataset_dir, target, reference, layout)
    if not datalist["training"]:
        raise ValueError(f'datalist {dataset_dir}: has no section "training", so there is nothing to train on')
    if not split:
        by_name = {item["subject"]: item for item in datalist["training"]}
        recorded = _recorded_split(Path(output_dir) / DATALIST_FILE, made_with, set(by_name)) if keep_split else None
        training, held_out = recorded or split_subjects(list(by_name), validation, seed)
        datalist = {"training": [by_name[s] for s in training], "validation": [by_name[s] for s in held_out]}
    datalist = {name: datalist[name] for name in ("training", "validation")}
    require_paired_grids(datalist["training"] + datalist["validation"])
    return {"made_with": made_with, **datalist}


def _recorded_split(file: Path, made_with: dict[str, Any], present: set[str]) -> tuple[list[str], list[str]] | None:
    """Training and held-out subjects of an earlier run, if it was of these subjects, wherever they lie now."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content["made_with"]
        names = [[item["subject"] for item in content[section]] for section in ("training", "validation")]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: is no datalist of this package ({error!r}); remove it to split anew") from error
    changed = [
        f"{name}={made_with[name]!r}, was {found.get(name)!r}"
        for name in ("target", "reference")
        if found.get(name) != made_with[name]
    ]
    recorded = {*names[0], *names[1]}
    if not recorded & present:
        changed.append("other subjects")
    elif recorded - present:
        raise FileNotFoundError(
            f"{file} names {', '.join(sorted(recorded - present))}, of whom the data set lacks one contrast or both; "
            "put the files back, or use another output_dir"
        )
    if changed:
        logger.warning("%s is of other data (%s): splitting anew", file, "; ".join(changed))
        return None
    logger.info("split of %s", file)
    return names[0], names[1]


def split_folder(folders: Sequence[str | os.PathLike[str]]) -> Path:
    """The first of the folders in which a split stands, for :func:`prepare_datalist` to keep; else the first one."""
    return next((Path(f) for f in folders if (Path(f) / DATALIST_FILE).is_file()), Path(folders[0]))


def write_datalist(datalist: Datalist, output_dir: str | os.PathLike[str]) -> None:
    """Write the split of :func:`prepare_datalist` into the folder of the results.

    Call it once the volumes have proved to be usable: the split of an earlier run must not be lost to bad input.

    Raises:
        OSError: it cannot be written.
    """
    file = write_json(Path(output_dir) / DATALIST_FILE, datalist)
    logger.info(
        "%d subjects to train on, %d held out (%s); split written to %s",
        len(datalist["training"]),
        len(datalist["validation"]),
        ", ".join(item["subject"] for item in datalist["validation"]),
        file,
    )


def contrast_items(
    items: Sequence[Item],
    dataset_dir: str | os.PathLike[str],
    target: str,
    reference: str,
    layout: str = "auto",
    slice_axis: str | int = "auto",
) -> list[dict[str, Any]]:
    """All contrasts of subjects, for a training on any two of them.

    Args:
        items: the subjects, of :func:`prepare_datalist`.
        dataset_dir: the data set they are of.
        target: contrast that ``items`` have as target.
        reference: contrast that they have as reference.
        layout: see :func:`~glmamba_monai.data.layouts.find_subjects`.
        slice_axis: see :func:`~glmamba_monai.transforms.grid.slice_axes`.

    Returns:
        Items ``{"subject", "contrasts", "files", "slice_axis"}``, one for each axis across which a subject has slices:
        names and files of its contrasts, target and reference first. A contrast on another grid than the target is
        left out with a warning.

    Raises:
        FileNotFoundError, ValueError: a file is missing, unreadable or no volume.
    """
    path = _absolute(dataset_dir)
    if path.suffix == ".json":
        subjects = {name: images for section in read_json_datalist(path).values() for name, images in section.items()}
    else:
        _, subjects = find_subjects(path, layout)
    found: list[dict[str, Any]] = []
    for item in items:
        files = {contrast_name(target): item["target"], contrast_name(reference): item["reference"]}
        grid = _grid_of(item["target"])
        others = {name: str(subjects[item["subject"]][name]) for name in CONTRASTS if name in subjects[item["subject"]]}
        for name, file in others.items():
            if name in files:
                continue
            try:
                require_same_grid(grid, _grid_of(file))
            except ValueError as error:
                logger.warning("%s: left out", error)
            else:
                files[name] = file
        found += [
            {"subject": item["subject"], "contrasts": list(files), "files": list(files.values()), "slice_axis": axis}
            for axis in slice_axes(grid[1], slice_axis)
        ]
    return found


def _grid_of(file: str) -> Grid:
    volume = require_volume_file(file)
    return volume.shape, volume.affine, file


def at_factors(items: Sequence[Item], factors: Sequence[float]) -> list[dict[str, Any]]:
    """Every item once at each factor: with the key ``scale``, and the factor in the name of its subject."""
    return [{**item, "subject": f"{item['subject']} at {f:g}x", "scale": f} for item in items for f in factors]


def evaluation_items(
    evaluate_on: str,
    dataset_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    target: str,
    reference: str,
    layout: str = "auto",
    validation: float | Sequence[str] = VALIDATION_FRACTION,
    seed: int = 0,
) -> list[Item]:
    """The items to evaluate on.

    Args:
        evaluate_on: "validation" or "training" of the split that the training has recorded in ``output_dir``; "test" of
            a JSON datalist; "all" for everything in the data set.
        dataset_dir: see :func:`prepare_datalist`, as for the other arguments.

    Raises:
        ValueError: there is no such section, and what :func:`prepare_datalist` raises.
    """
    datalist, split = find_items(dataset_dir, target, reference, layout)
    if evaluate_on == "all":
        items = [item for section in datalist.values() for item in section]
    else:
        if not split and evaluate_on != "test":
            datalist = prepare_datalist(
                dataset_dir, output_dir, target, reference, layout, validation, seed, keep_split=True
            )
        items = datalist.get(evaluate_on, []) if evaluate_on in ("validation", "training", "test") else []
    if not items:
        raise ValueError(
            f"evaluate_on={evaluate_on!r}: expected validation, training, test or all, with subjects in {dataset_dir}"
        )
    require_paired_grids(items)
    return items


def inference_items(
    image: str | os.PathLike[str] | None,
    reference: str | os.PathLike[str] | None,
    dataset_dir: str | os.PathLike[str] | None,
    target: str,
    layout: str = "auto",
) -> list[Item]:
    """What to super-resolve: one pair of files, or every subject of a data set whose target is low-resolution.

    Args:
        image: the low-resolution volume, for one pair of files; without ``reference`` a 4-D NIfTI file of both
            (:func:`~glmamba_monai.transforms.pair.open_pair`).
        reference: the sharp volume of the other contrast; with ``dataset_dir`` the name of that contrast.
        dataset_dir: folder in one of the layouts or a JSON datalist.
        target: with ``dataset_dir``, the contrast to super-resolve.
        layout: see :func:`~glmamba_monai.data.layouts.find_subjects`.

    Returns:
        Items ``{"subject", "image", "reference"}``: name of the output, low-resolution volume, reference volume, which
        an ``image`` of both does not have.

    Raises:
        ValueError: neither or both of the two ways are given, or the reference is not given in either.
        FileNotFoundError, ValueError: a contrast of a subject is missing, or the only file is missing, unreadable or no
            volume.
    """
    if (image is None) == (dataset_dir is None) or (image is None and reference is None):
        raise ValueError(
            "give either --image LR.nii.gz --reference REFERENCE.nii.gz, or --dataset_dir FOLDER --reference CONTRAST, "
            "or --image PAIR.nii.gz, a 4-D NIfTI file of both; "
            f"got image={image}, reference={reference}, dataset_dir={dataset_dir}"
        )
    if image is not None and reference is None:
        open_pair(image)
        return [{"subject": volume_name(image), "image": str(image)}]
    if image is not None:
        items = [{"subject": volume_name(image), "image": str(image), "reference": str(reference)}]
    else:
        datalist, _ = find_items(str(dataset_dir), target, str(reference), layout, skip_incomplete=False)
        pairs = [item for section in datalist.values() for item in section]
        items = [{"subject": p["subject"], "image": p["target"], "reference": p["reference"]} for p in pairs]
    for item in items if len(items) == 1 else ():  # one of several must not cost the others: LenientDataset
        for role in ("image", "reference"):
            if file_format(item[role]) == "NIfTI":
                require_volume_file(item[role])
            else:
                require_readable(item[role])
    return items
