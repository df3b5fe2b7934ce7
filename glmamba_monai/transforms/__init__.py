from glmamba_monai.transforms.augmentation import FACTORS, RandLowResolutiond, RandPixelSized, inverted_contrast
from glmamba_monai.transforms.intensity import RestoreIntensityd, ScaleByPercentile, ScaleByPercentiled
from glmamba_monai.transforms.kspace import (
    KSpaceLowResolution,
    KSpaceLowResolutiond,
    KSpaceUpsample,
    KSpaceUpsampled,
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
    "RestoreIntensityd",
    "ScaleByPercentile",
    "ScaleByPercentiled",
    "SlicesBackd",
    "inverted_contrast",
]
