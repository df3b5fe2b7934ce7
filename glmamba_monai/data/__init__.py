from glmamba_monai.data.datalist import (
    dataset_or_demo,
    find_items,
    inference_items,
    prepare_datalist,
    section,
    split_subjects,
    write_datalist,
)
from glmamba_monai.data.dataset import SliceDataset, SliceDraw, SliceSampler, share_of_rank, volume_dataset
from glmamba_monai.data.layouts import LAYOUTS, find_subjects
from glmamba_monai.data.phantom import demo_data, write_demo_data

__all__ = [
    "LAYOUTS",
    "SliceDataset",
    "SliceDraw",
    "SliceSampler",
    "dataset_or_demo",
    "demo_data",
    "find_items",
    "find_subjects",
    "inference_items",
    "prepare_datalist",
    "section",
    "share_of_rank",
    "split_subjects",
    "volume_dataset",
    "write_datalist",
    "write_demo_data",
]
