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
from glmamba_monai.transforms.pair import GatherPaird, RecordGridd
from glmamba_monai.transforms.segmentation import LargeComponents, LoadLabeld, ScaleByMedian, ScaleByMediand
from glmamba_monai.transforms.volume import (
    DataRanged,
    ForegroundLeveld,
    ForegroundSlicesd,
    LoadVolume,
    LoadVolumed,
    MatchReferenced,
    NameOutputd,
    PairOnGridd,
    RegisterReferenced,
    SlicesBackd,
)

__all__ = [
    "FACTORS",
    "DataRanged",
    "ForegroundLeveld",
    "ForegroundSlicesd",
    "GatherPaird",
    "KSpaceDataConsistency",
    "KSpaceDataConsistencyd",
    "KSpaceLowResolution",
    "KSpaceLowResolutiond",
    "KSpaceUpsample",
    "KSpaceUpsampled",
    "LargeComponents",
    "LoadLabeld",
    "LoadVolume",
    "LoadVolumed",
    "MatchReferenced",
    "NameOutputd",
    "PairOnGridd",
    "RandLowResolutiond",
    "RandPixelSized",
    "RecordGridd",
    "RegisterReferenced",
    "RequireKSpaceCropd",
    "RestoreIntensityd",
    "ScaleByMedian",
    "ScaleByMediand",
    "ScaleByPercentile",
    "ScaleByPercentiled",
    "SlicesBackd",
    "inverted_contrast",
]
