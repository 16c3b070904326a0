"""Training: recipes, `train`, and the run folder it writes."""

from keras_vit.training.callbacks import NonFiniteLossError
from keras_vit.training.probing import ProbeResult, probe
from keras_vit.training.recipes import RECIPES, Recipe
from keras_vit.training.run import Run, load_run
from keras_vit.training.trainer import train

__all__ = [
    "RECIPES",
    "NonFiniteLossError",
    "ProbeResult",
    "Recipe",
    "Run",
    "load_run",
    "probe",
    "train",
]
