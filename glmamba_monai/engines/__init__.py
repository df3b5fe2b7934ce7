from glmamba_monai.engines.checkpoint import TrainingState, WeightAverage
from glmamba_monai.engines.distributed import join_process_group
from glmamba_monai.engines.downstream import DownstreamResults, MethodVolumes
from glmamba_monai.engines.ensemble import EnsembleMeand, SelfEnsembleInferer
from glmamba_monai.engines.evaluation import ResultsWriter, SubjectMetrics, prepare_batch, super_resolved
from glmamba_monai.engines.graphs import GraphInferer
from glmamba_monai.engines.muon import Muon, parameter_groups
from glmamba_monai.engines.plan import TrainingPlan, segmentation_plan, trainable_parameters, training_plan
from glmamba_monai.engines.progress import EpochLine, FinalTable, LossCurve, ValidationPictures
from glmamba_monai.engines.segmentation import SegmentationLine, SliceDice, mask_items, mask_of, prepare_mask_batch
from glmamba_monai.engines.trainer import GradientLimit, SliceTrainer, stacked_items, super_resolved_items
from glmamba_monai.engines.volumes import VolumeEvaluator
from glmamba_monai.engines.weights import WeightsLoader, find_weights, load_weights, with_initial_weights

__all__ = [
    "DownstreamResults",
    "EnsembleMeand",
    "EpochLine",
    "FinalTable",
    "GradientLimit",
    "GraphInferer",
    "LossCurve",
    "MethodVolumes",
    "Muon",
    "ResultsWriter",
    "SegmentationLine",
    "SelfEnsembleInferer",
    "SliceDice",
    "SliceTrainer",
    "SubjectMetrics",
    "TrainingPlan",
    "TrainingState",
    "ValidationPictures",
    "VolumeEvaluator",
    "WeightAverage",
    "WeightsLoader",
    "find_weights",
    "join_process_group",
    "load_weights",
    "mask_items",
    "mask_of",
    "parameter_groups",
    "prepare_batch",
    "prepare_mask_batch",
    "segmentation_plan",
    "stacked_items",
    "super_resolved",
    "super_resolved_items",
    "trainable_parameters",
    "training_plan",
    "with_initial_weights",
]
