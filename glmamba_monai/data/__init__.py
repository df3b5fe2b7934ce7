from glmamba_monai.data.contrasts import ContrastPairs, ContrastVolume
from glmamba_monai.data.datalist import (
    at_factors,
    contrast_items,
    dataset_or_demo,
    evaluation_items,
    find_items,
    inference_items,
    prepare_datalist,
    split_folder,
    split_subjects,
    write_datalist,
)
from glmamba_monai.data.dataset import (
    BackgroundDataLoader,
    RandOrientedCropd,
    SliceDataset,
    SliceDraw,
    SliceSampler,
    batch_of_rank,
    collate_slices,
    share_of_rank,
    volume_dataset,
)
from glmamba_monai.data.layouts import LAYOUTS, find_subjects
from glmamba_monai.data.phantom import demo_data, write_demo_data
from glmamba_monai.data.segmentation import LabelledSlices, labelled_datalist, labelled_items, segmentation_items

__all__ = [
    "LAYOUTS",
    "BackgroundDataLoader",
    "ContrastPairs",
    "ContrastVolume",
    "LabelledSlices",
    "RandOrientedCropd",
    "SliceDataset",
    "SliceDraw",
    "SliceSampler",
    "at_factors",
    "batch_of_rank",
    "collate_slices",
    "contrast_items",
    "dataset_or_demo",
    "demo_data",
    "evaluation_items",
    "find_items",
    "find_subjects",
    "inference_items",
    "labelled_datalist",
    "labelled_items",
    "prepare_datalist",
    "segmentation_items",
    "share_of_rank",
    "split_folder",
    "split_subjects",
    "volume_dataset",
    "write_datalist",
    "write_demo_data",
]
