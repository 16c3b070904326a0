"""Training: recipes, `train` and `resume`, the run folder, `DistributedModel` for `model.fit`."""

from keras_vit.training.callbacks import NonFiniteLossError, TrainingInterrupted
from keras_vit.training.distributed import DistributedModel
from keras_vit.training.mixing import Mixing
from keras_vit.training.probing import ProbeResult, probe
from keras_vit.training.recipes import RECIPES, Recipe
from keras_vit.training.run import Run, load_run
from keras_vit.training.trainer import resume, train

__all__ = [
    "RECIPES",
    "DistributedModel",
    "Mixing",
    "NonFiniteLossError",
    "ProbeResult",
    "Recipe",
    "Run",
    "TrainingInterrupted",
    "load_run",
    "probe",
    "resume",
    "train",
]
