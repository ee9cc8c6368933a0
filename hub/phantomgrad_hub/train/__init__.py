"""Training: typed configurations, recipes, and one visible loop on Accelerate."""

from .checks import check_source as check_source
from .config import OptimizerConfig as OptimizerConfig
from .config import ScheduleConfig as ScheduleConfig
from .config import SolverPhase as SolverPhase
from .config import TrainConfig as TrainConfig
from .errors import SettingError as SettingError
from .errors import TrainingError as TrainingError
from .loop import TrainResult as TrainResult
from .loop import train as train
from .recipes import RECIPES as RECIPES
from .recipes import cifar10_large as cifar10_large
from .recipes import cifar10_tiny as cifar10_tiny
from .recipes import finetune as finetune
from .recipes import imagenet_small as imagenet_small
from .recipes import tiny_imagenet as tiny_imagenet
from .settings import apply_settings as apply_settings

__all__ = [
    "RECIPES",
    "OptimizerConfig",
    "ScheduleConfig",
    "SettingError",
    "SolverPhase",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "apply_settings",
    "check_source",
    "cifar10_large",
    "cifar10_tiny",
    "finetune",
    "imagenet_small",
    "tiny_imagenet",
    "train",
]
