"""A multi-contrast brain phantom: the data of whoever has none.

The anatomy comes from the MNI152 (ICBM 2009a) T1, grey- and white-matter maps that nilearn ships, so nothing
is downloaded. A subject is made in these steps, each a function below:

1. a smooth random deformation of the atlas (`_deformation`), new for every subject and not symmetric;
2. crisp tissue fractions at points of the brain (`_Anatomy.fractions`): the atlas is an average and therefore
   blurry, so its probabilities are sharpened, and sulci, vessels and a tumour are added;
3. the signal of each tissue from the inversion-recovery spin-echo equation (`_signal`);
4. partial volume: several points in each voxel are evaluated and their signals averaged (`make_subject`);
5. a smooth coil bias and Rician noise (`_acquire`), and exactly zero outside the brain, without noise, as in
   the skull-stripped BraTS data.

World coordinates are those of MNI space in mm: x to the right, y to the front, z upwards.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

__all__ = ["CONTRASTS", "cache_dir", "demo_data", "make_subject", "write_demo_data"]


@dataclass(frozen=True)
class Tissue:
    """Proton density (water = 1) and relaxation times in ms."""

    density: float
    t1: float
    t2: float


@dataclass(frozen=True)
class Timing:
    """Repetition, echo and inversion time of an acquisition in ms; no `ti` means a plain spin echo."""

    tr: float
    te: float
    ti: float | None = None


# Approximate values at 1.5 T, rounded between those of the BrainWeb simulator (Kwan et al., IEEE TMI 1999)
# and of Stanisz et al. (MRM 2005). Lesions have longer T1 and T2 than white matter, most of all where the
# tumour is necrotic; flowing blood leaves a void.
TISSUES = {
    "csf": Tissue(1.00, 4000, 2000),
    "grey": Tissue(0.86, 950, 92),
    "white": Tissue(0.74, 620, 73),
    "deep_grey": Tissue(0.81, 820, 80),
    "vessel": Tissue(0.15, 1400, 60),
    "core": Tissue(0.88, 1300, 125),
    "necrosis": Tissue(0.95, 2200, 260),
    "oedema": Tissue(0.87, 1150, 135),
}

TIMINGS = {
    "t1": Timing(tr=2000, te=4, ti=900),
    "t2": Timing(tr=4500, te=95),
    "pd": Timing(tr=4500, te=15),
    "flair": Timing(tr=9000, te=110, ti=2300),
}
CONTRASTS = tuple(TIMINGS)

FIELD_OF_VIEW = (192.0, 224.0, 192.0)  # mm; holds the deformed brain
CENTRE = (0.0, -18.0, 16.0)  # MNI mm; above the middle of the brain, so that few slices show the cerebrum
SIGNAL_SCALE = 2000.0  # CSF in T2 comes out near 1300, white matter in T1 near 800
POINT_SPREAD = 1.3  # width over which a voxel averages, in voxels: that of a lightly filtered k-space
SNR = 50.0  # mean signal of the brain over the noise of one channel
TEXTURE = 0.04  # relative SD of T1 and T2 within a tissue
TUMOUR_DEPTH = 14.0  # mm from the surface of the brain to the centre of a tumour, at least

LATTICE = 4.0  # mm between the nodes of the displacement field
MARGIN = 20.0  # mm that the displacement field reaches beyond the field of view
OUTSIDE = -8.0  # depth in mm that stands for everything farther from the brain

DEMO: dict[str, Any] = {"subjects": 6, "spacing": (2.0, 2.0, 4.0), "slices": 24, "seed": 0}

README = """A synthetic multi-contrast brain phantom, made by glmamba_monai.

No person was scanned. Subjects are random deformations of the MNI152 average brain with simulated
T1, T2, PD and FLAIR intensities, bias field and noise, skull-stripped, background zero. Every
second subject, from subject-001 on, has a simulated tumour and its label seg.nii.gz: 1 tumour core,
2 oedema; the whole tumour is seg > 0. Intensities are arbitrary units. For trying the software
only: results on it say nothing about patients.

Settings: {settings}

The anatomy derives from the ICBM 152 nonlinear 2009a atlas as distributed with nilearn:

Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University. Permission to use, copy, modify, and distribute this software and its
documentation for any purpose and without fee is hereby granted, provided that the above copyright
notice appear in all copies. The authors and McGill University make no representations about the
suitability of this software for any purpose. It is provided "as is" without express or implied
warranty. The authors are not responsible for any data loss, equipment damage, property loss, or
injury to subjects or patients resulting from the use or misuse of this software package.

Please cite: Fonov V, Evans AC, Botteron K, Almli CR, McKinstry RC, Collins DL. Unbiased average
age-appropriate atlases for pediatric studies. NeuroImage 54 (2011) 313-327.

nilearn (https://nilearn.github.io) is distributed under the BSD 3-clause licence.
"""


@dataclass(frozen=True)
class _Atlas:
    """Maps of the MNI152 brain: grey and white probability, and depth under the brain's surface in mm."""

    grey: np.ndarray
    white: np.ndarray
    depth: np.ndarray
    to_voxel: np.ndarray  # 4 x 4, from MNI mm

    def sample(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Grey, white and depth at `points` (3, ...) in MNI mm."""
        voxels = np.tensordot(self.to_voxel[:3, :3], points, 1)
        voxels += self.to_voxel[:3, 3].reshape(3, *[1] * (points.ndim - 1))
        return tuple(
            ndimage.map_coordinates(image, voxels, order=1, cval=outside, output=np.float32)
            for image, outside in ((self.grey, 0.0), (self.white, 0.0), (self.depth, OUTSIDE))
        )


@lru_cache(maxsize=1)
def _atlas() -> _Atlas:
    from nilearn import datasets  # takes seconds to import: only when a phantom is really made

    template = datasets.load_mni152_template(resolution=1)
    grey, white = (
        np.asarray(load(resolution=1).dataobj, dtype=np.float32)
        for load in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    brain = (np.asarray(template.dataobj) > 0).astype(np.float32)
    brain = ndimage.gaussian_filter(brain, 1.0) > 0.5  # takes the voxel steps off the surface
    depth = np.full(brain.shape, OUTSIDE, np.float32)
    box = tuple(slice(max(b.start - 8, 0), b.stop + 8) for b in ndimage.find_objects(brain.astype(np.uint8))[0])
    inner = brain[box]
    depth[box] = ndimage.distance_transform_edt(inner) - ndimage.distance_transform_edt(~inner)
    return _Atlas(grey, white, depth, np.linalg.inv(template.affine))


class _RandomField:
    """A smooth random function of space with mean 0 and SD 1, whose details are about `size` mm wide.

    It repeats every 64 `size`: a tile is enough for the eye and costs the same at every resolution. Where the
    function is zero are thin folded sheets, and where two of them are zero are thin curves: the sulci and
    vessels below.
    """

    nodes = 96
    nodes_per_size = 1.5

    def __init__(self, rng: np.random.Generator, size: float) -> None:
        noise = rng.standard_normal((self.nodes,) * 3, dtype=np.float32)
        tile = ndimage.gaussian_filter(noise, self.nodes_per_size, mode="wrap")
        self.tile = tile / tile.std()
        self.nodes_per_mm = self.nodes_per_size / size

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Value at `points` (3, ...) in mm."""
        voxels = points * np.float32(self.nodes_per_mm)
        return ndimage.map_coordinates(self.tile, voxels, order=1, mode="grid-wrap")


def _deformation(rng: np.random.Generator) -> np.ndarray:
    """Displacement (3, X, Y, Z) in mm on a lattice of `LATTICE` mm around `CENTRE`.

    The atlas is read at `point + displacement`. The displacement is the sum of a linear part (size, shear and
    pose of the head) and two smooth random fields (shape, gyri). Amplitudes stay small against the widths, so
    that the Jacobian stays positive.
    """
    shape = [round((length + 2 * MARGIN) / LATTICE) + 1 for length in FIELD_OF_VIEW]
    nodes = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * LATTICE for n in shape], indexing="ij"))
    displacement = np.tensordot(rng.normal(0, 0.025, (3, 3)), nodes, 1)
    for width, amplitude in ((26.0, 3.0), (10.0, 0.9)):
        noise = rng.standard_normal((3, *shape))
        smooth = np.stack([ndimage.gaussian_filter(n, width / LATTICE, mode="wrap") for n in noise])
        displacement += amplitude * smooth / smooth.std(axis=(1, 2, 3), keepdims=True)
    return displacement.astype(np.float32)


def _displacement_at(displacement: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Displacement (3, ...) in mm at world `points` (3, ...) in mm."""
    first = np.array(CENTRE) - (np.array(displacement.shape[1:]) - 1) / 2 * LATTICE
    voxels = (points - first.reshape(3, *[1] * (points.ndim - 1))) / LATTICE
    return np.stack([ndimage.map_coordinates(d, voxels, order=1, mode="nearest") for d in displacement])


@dataclass(frozen=True)
class _Tumour:
    centre: np.ndarray  # MNI mm in the atlas
    radius: float  # mm
    oedema: float  # mm beyond the core


def _place_tumour(rng: np.random.Generator, atlas: _Atlas, slab: float) -> _Tumour:
    """A tumour in the white matter of one hemisphere, near the middle of the `slab` mm that are imaged."""
    voxels = np.argwhere((atlas.white > 0.8) & (atlas.depth > TUMOUR_DEPTH))
    points = nib.affines.apply_affine(np.linalg.inv(atlas.to_voxel), voxels)
    near_middle = np.abs(points[:, 2] - CENTRE[2]) <= min(slab / 4, 24.0)
    points = points[near_middle & (np.abs(points[:, 0]) > 16)]
    return _Tumour(rng.choice(points), rng.uniform(10, 15), rng.uniform(8, 14))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _inside_ellipsoid(points: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """1 inside, 0 outside, with a soft border."""
    radius = np.sqrt(sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii)))
    return _sigmoid(8 * (1 - radius))


class _Anatomy:
    """One subject's tissues as a function of world space."""

    def __init__(self, rng: np.random.Generator, slab: float, tumour: bool) -> None:
        self.atlas = _atlas()
        self.displacement = _deformation(rng)
        self.sulci = _RandomField(rng, 4.5)
        self.vessels = _RandomField(rng, 6.0)
        self.fine = _RandomField(rng, 2.0)
        self.water = _RandomField(rng, 1.3)
        self.csf_gain = rng.uniform(1.4, 2.4)  # atrophy: width of ventricles and sulci
        self.tumour = _place_tumour(rng, self.atlas, slab) if tumour else None

    def depth(self, points: np.ndarray) -> np.ndarray:
        """Depth under the brain's surface in mm, negative outside, at `points` (3, ...) in mm."""
        return self.atlas.sample(points + _displacement_at(self.displacement, points))[2]

    def fractions(self, points: np.ndarray) -> np.ndarray:
        """Fractions (tissues, ...) of `TISSUES` at `points` (3, ...) in mm, all zero outside the brain."""
        where = (points + _displacement_at(self.displacement, points)).astype(np.float32)
        grey, white, depth = self.atlas.sample(where)
        sulci, vessels, fine = self.sulci(points), self.vessels(points), self.fine(points)

        # Deep grey matter and brainstem are true mixtures in the atlas: sharpened less, and without sulci.
        basal = _inside_ellipsoid(where, (0, -8, 4), (40, 34, 20))
        stem = _inside_ellipsoid(where, (0, -28, -35), (18, 18, 30))
        deep = np.maximum(basal, stem)
        cortex = _sigmoid((16 - depth) / 2) * (1 - deep)
        sharpness = 5.0 - 3.5 * deep

        def score(probability: np.ndarray) -> np.ndarray:
            return sharpness * np.log(np.maximum(probability, 0) + 0.01)

        # A softmax of the scores, shifted by fine noise (ragged borders) and by the sheets of `sulci`.
        csf = np.exp(score(self.csf_gain * (1 - grey - white)) + 3 * np.exp(-((sulci / 0.15) ** 2)) * cortex + fine / 2)
        grey = np.exp(score(grey))
        white = np.exp(score(white) + 1.5 * (np.abs(sulci) - 0.8) * cortex - fine / 2)
        total = csf + grey + white
        inside = _sigmoid(2.5 * (depth - 0.5))  # a thin layer of CSF lies on the brain
        grey, white = grey / total * inside, white / total * inside
        csf = 1 - grey - white

        # Thin curves: flow voids in the cortex and its sulci, perivascular CSF in white matter.
        thread = np.exp(-(sulci**2 + vessels**2) / 0.12**2)
        vessel = thread * cortex * (1 - white)
        csf, grey = csf * (1 - thread * cortex), grey * (1 - thread * cortex)
        csf, white = csf + thread * white, white * (1 - thread)
        tissues = {
            "csf": csf,
            "grey": grey * (1 - basal),
            "white": white,
            "deep_grey": grey * basal,
            "vessel": vessel,
        }
        if self.tumour is not None:
            tissues = _grow(self.tumour, tissues, where, sulci, fine)
        brain = _sigmoid(4 * (depth + 0.7))
        absent = np.zeros_like(brain)
        return np.stack([tissues.get(name, absent) for name in TISSUES]) * brain


def _grow(
    tumour: _Tumour, tissues: dict[str, np.ndarray], where: np.ndarray, sulci: np.ndarray, fine: np.ndarray
) -> dict[str, np.ndarray]:
    """Replace tissue by a lobed core with a necrotic centre, and white matter around it by oedema."""
    distance = np.sqrt(sum((w - c) ** 2 for w, c in zip(where, tumour.centre)))
    core = _sigmoid(2 * (tumour.radius - distance * (1 + 0.15 * sulci)))
    necrosis = core * _sigmoid(2 * (0.55 * tumour.radius + 1.5 * fine - distance))
    oedema = (1 - core) * _sigmoid(tumour.radius + tumour.oedema * (1 + 0.3 * sulci) - distance)
    swollen = {"white": 0.9, "grey": 0.15, "deep_grey": 0.15}  # oedema follows white matter
    grown = {name: fraction * (1 - core) for name, fraction in tissues.items()}
    grown["oedema"] = sum(share * oedema * tissues[name] for name, share in swollen.items())
    for name, share in swollen.items():
        grown[name] = grown[name] - share * oedema * tissues[name]
    return grown | {"core": core - necrosis, "necrosis": necrosis}


def _signal(tissue: Tissue, timing: Timing) -> float:
    """Magnitude of a spin echo or, with `ti`, of an inversion-recovery spin echo, in image units."""
    recovery = 1 - np.exp(-timing.tr / tissue.t1)
    if timing.ti is not None:
        recovery = 1 - 2 * np.exp(-timing.ti / tissue.t1) + np.exp(-timing.tr / tissue.t1)
    return float(SIGNAL_SCALE * tissue.density * abs(recovery) * np.exp(-timing.te / tissue.t2))


def _signals(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Signal (contrasts, tissues) of one subject, and its change where the tissue holds one SD more water."""
    spread = np.exp(rng.normal(0, (0.015, 0.04, 0.04), (len(TISSUES), 3)))
    own = [Tissue(t.density * d, t.t1 * a, t.t2 * b) for t, (d, a, b) in zip(TISSUES.values(), spread)]
    # Water lengthens both relaxation times: the texture darkens T1 where it brightens T2, as a lesion does.
    wet = [Tissue(t.density * (1 + TEXTURE / 2), t.t1 * (1 + TEXTURE), t.t2 * (1 + TEXTURE)) for t in own]
    signal, wet_signal = (
        np.array([[_signal(t, s) for t in tissues] for s in TIMINGS.values()]) for tissues in (own, wet)
    )
    return signal, wet_signal - signal


def _acquire(rng: np.random.Generator, signal: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Multiply `signal` (X, Y, Z) by a quadratic coil bias, add Rician noise, zero all but `brain`; int16."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in signal.shape], indexing="ij")
    terms = [*axes] + [axes[i] * axes[j] for i in range(3) for j in range(i, 3)]
    bias = np.exp(sum(c * term for c, term in zip(rng.normal(0, 0.06, len(terms)), terms)))
    biased = signal * bias
    sigma = biased[brain].mean() / SNR if brain.any() else 0.0
    real, imaginary = rng.normal(0, sigma, (2, *signal.shape))
    magnitude = np.hypot(biased + real, imaginary)
    return np.where(brain, np.clip(np.rint(magnitude), 1, np.iinfo(np.int16).max), 0).astype(np.int16)


def make_subject(
    seed: int | Sequence[int],
    *,
    spacing: float | Sequence[float] = 1.0,
    shape: Sequence[int] | None = None,
    tumour: bool = False,
) -> dict[str, nib.Nifti1Image]:
    """Simulate one subject's brain in all contrasts.

    Args:
        seed: any seed of `numpy.random.default_rng`; the same seed gives the same voxels on the same machine.
        spacing: voxel size in mm, one number or one for x, y, z.
        shape: voxels in x, y, z; None covers the head (`FIELD_OF_VIEW`). The grid is centred on `CENTRE`.
        tumour: whether the subject has a tumour with oedema.

    Returns:
        int16 images `t1`, `t2`, `pd`, `flair` of shape (X, Y, Z) in arbitrary units on one RAS grid in MNI
        space, zero outside the brain and at least 1 in it. With a tumour also `seg`: 0 background, 1 tumour
        core, 2 oedema; the whole tumour is `seg > 0`.

    Raises:
        ValueError: `spacing` or `shape` is not positive or not of three axes.
    """
    spacings, shape = _grid(spacing, shape)
    rng = np.random.default_rng(seed)
    anatomy = _Anatomy(rng, slab=spacings[2] * shape[2], tumour=tumour)
    signal, wetter = _signals(rng)

    affine = np.diag([*spacings, 1.0])
    affine[:3, 3] = np.array(CENTRE) - spacings * (np.array(shape) - 1) / 2
    centres = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)).reshape(-1, 3).T
    # Points of a voxel: at least two along each axis and about 1.5 mm apart.
    counts = np.maximum(2, np.ceil(spacings / 1.5)).astype(int)
    steps = [POINT_SPREAD * ((np.arange(n) + 0.5) / n - 0.5) for n in counts]
    offsets = np.stack([a.ravel() for a in np.meshgrid(*steps, indexing="ij")]) * spacings[:, None]

    near = np.flatnonzero(anatomy.depth(centres) > max(-0.6 * np.linalg.norm(spacings) - 1, OUTSIDE))
    means = np.zeros((len(CONTRASTS) + 3, centres.shape[1]))  # contrasts, brain, core, oedema

    def fill(chunk: np.ndarray) -> None:
        points = centres[:, chunk, None] + offsets[:, None, :]  # (3, voxels, points of a voxel)
        fractions = anatomy.fractions(points)
        named = dict(zip(TISSUES, fractions))
        images = np.tensordot(signal, fractions, 1) + anatomy.water(points) * np.tensordot(wetter, fractions, 1)
        rows = [*images, fractions.sum(0), named["core"] + named["necrosis"], named["oedema"]]
        means[:, chunk] = np.stack([row.mean(-1) for row in rows])

    per_chunk = max(1, 100_000 // offsets.shape[1])  # bounds the working memory at any size
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # SciPy's sampling lets go of the interpreter
        list(pool.map(fill, np.split(near, range(per_chunk, len(near), per_chunk))))

    *clean, brain, core, oedema = means.reshape(-1, *shape)
    inside = brain > 0.5
    volumes = {name: _acquire(rng, image, inside) for name, image in zip(CONTRASTS, clean)}
    if tumour:
        whole = inside & (core + oedema > 0.5)
        volumes["seg"] = np.where(whole, np.where(core > 0.5, 1, 2), 0).astype(np.int16)
    images = {name: nib.Nifti1Image(volume, affine) for name, volume in volumes.items()}
    for image in images.values():
        image.header.set_xyzt_units("mm")
    return images


def _grid(spacing: float | Sequence[float], shape: Sequence[int] | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """Spacing in mm and shape of three axes."""
    spacings = np.asarray(spacing, dtype=float)
    if spacings.shape not in ((), (3,)) or not np.all(np.isfinite(spacings) & (spacings > 0)):
        raise ValueError(f"spacing: {spacing!r} found, one positive number of mm or three expected")
    spacings = np.broadcast_to(spacings, 3)
    if shape is None:
        shape = np.ceil(np.array(FIELD_OF_VIEW) / spacings).astype(int)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: {tuple(shape)} found, three positive numbers of voxels expected")
    return spacings, tuple(int(n) for n in shape)


def write_demo_data(
    out: str | os.PathLike[str],
    subjects: int = DEMO["subjects"],
    *,
    spacing: float | Sequence[float] = DEMO["spacing"],
    slices: int = DEMO["slices"],
    seed: int = DEMO["seed"],
) -> Path:
    """Write simulated subjects in the plain layout (docs/data.md, layouts), every second one with a tumour.

    The folder appears complete or not at all: it is built beside `out` and renamed.

    Args:
        out: folder to make: `out/subject-000/{t1,t2,pd,flair}.nii.gz`, for odd subjects also `seg.nii.gz`,
            and `out/README.txt`.
        subjects: number of subjects.
        spacing: voxel size in mm, one number or one for x, y, z.
        slices: axial slices a subject.
        seed: seed of the whole set; subject `i` does not depend on how many there are.

    Returns:
        `out` as a path.

    Raises:
        FileExistsError: `out` exists and is not an empty folder; it is left as it is.
        ValueError: a number is not positive.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: name a new one, nothing was written")
    for name, number in (("subjects", subjects), ("slices", slices)):
        if number < 1:
            raise ValueError(f"{name}: {number} found, at least 1 expected")
    spacings, full = _grid(spacing, None)

    settings = {"subjects": subjects, "spacing_mm": spacings.tolist(), "slices": slices, "seed": seed}
    building = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    building.mkdir(parents=True)
    try:
        for i in tqdm(range(subjects), desc="brain phantom", unit="subject"):
            folder = building / f"subject-{i:03d}"
            folder.mkdir()
            images = make_subject((seed, i), spacing=spacings, shape=(*full[:2], slices), tumour=i % 2 == 1)
            for name, image in images.items():
                nib.save(image, folder / f"{name}.nii.gz")
        (building / "README.txt").write_text(README.format(settings=json.dumps(settings)), encoding="utf-8")
        if out.is_dir():
            out.rmdir()  # empty; Windows does not rename onto a folder
        try:
            building.rename(out)
        except OSError as error:
            if out.exists():
                raise FileExistsError(f"{out} appeared while its data were made: left as it is") from error
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def cache_dir() -> Path:
    """Folder of generated data: `$GLMAMBA_CACHE`, else `glmamba_monai` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("GLMAMBA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glmamba_monai"


def demo_data() -> Path:
    """The small default data set (`DEMO`), made at first use and kept in `cache_dir()`.

    Its folder is named after the settings and this file's content: another recipe makes another folder.
    Processes that start together each build a copy; the first to finish wins and all use that one.

    Returns:
        Folder in the plain layout (docs/data.md, layouts).
    """
    recipe = Path(__file__).read_bytes() + json.dumps(DEMO).encode()
    folder = cache_dir() / f"phantom-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not folder.is_dir():
        try:
            write_demo_data(folder, **DEMO)
        except FileExistsError:
            if not folder.is_dir():
                raise
        finally:
            _atlas.cache_clear()  # 100 MB that training would carry along
    return folder
