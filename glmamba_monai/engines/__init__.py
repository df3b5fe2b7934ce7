from glmamba_monai.engines.checkpoint import TrainingState, WeightAverage, WeightsLoader, find_weights, load_weights
from glmamba_monai.engines.distributed import join_process_group
from glmamba_monai.engines.evaluation import ResultsWriter, SubjectMetrics, prepare_batch, super_resolved
from glmamba_monai.engines.plan import TrainingPlan, trainable_parameters, training_plan
from glmamba_monai.engines.progress import EpochLine, FinalTable, LossCurve, ValidationPictures
from glmamba_monai.engines.trainer import GraphInferer, SliceTrainer, stacked_items, super_resolved_items

__all__ = [
    "EpochLine",
    "FinalTable",
    "GraphInferer",
    "LossCurve",
    "ResultsWriter",
    "SliceTrainer",
    "SubjectMetrics",
    "TrainingPlan",
    "TrainingState",
    "ValidationPictures",
    "WeightAverage",
    "WeightsLoader",
    "find_weights",
    "join_process_group",
    "load_weights",
    "prepare_batch",
    "stacked_items",
    "super_resolved",
    "super_resolved_items",
    "trainable_parameters",
    "training_plan",
]
