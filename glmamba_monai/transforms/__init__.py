from glmamba_monai.transforms.augmentation import FACTORS, RandLowResolutiond, RandPixelSized, inverted_contrast
from glmamba_monai.transforms.intensity import RestoreIntensityd, ScaleByPercentile, ScaleByPercentiled
from glmamba_monai.transforms.kspace import (
    KSpaceDataConsistency,
    KSpaceDataConsistencyd,
    KSpaceLowResolution,
    KSpaceLowResolutiond,
    KSpaceUpsample,
    KSpaceUpsampled,
    RequireKSpaceCropd,
)
from glmamba_monai.transforms.volume import (
    DataRanged,
    ForegroundLeveld,
    ForegroundSlicesd,
    LoadVolume,
    LoadVolumed,
    MatchReferenced,
    NameOutputd,
    PairOnGridd,
    SlicesBackd,
)

__all__ = [
    "FACTORS",
    "DataRanged",
    "ForegroundLeveld",
    "ForegroundSlicesd",
    "KSpaceDataConsistency",
    "KSpaceDataConsistencyd",
    "KSpaceLowResolution",
    "KSpaceLowResolutiond",
    "KSpaceUpsample",
    "KSpaceUpsampled",
    "LoadVolume",
    "LoadVolumed",
    "MatchReferenced",
    "NameOutputd",
    "PairOnGridd",
    "RandLowResolutiond",
    "RandPixelSized",
    "RequireKSpaceCropd",
    "RestoreIntensityd",
    "ScaleByPercentile",
    "ScaleByPercentiled",
    "SlicesBackd",
    "inverted_contrast",
]
