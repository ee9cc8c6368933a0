"""Image classification data: where it comes from and how it is augmented."""

from .errors import DataError as DataError
from .sources import FolderImages as FolderImages
from .sources import ImageSplit as ImageSplit
from .sources import Joined as Joined
from .sources import ParquetImages as ParquetImages
from .sources import Source as Source
from .sources import Subset as Subset
from .sources import open_source as open_source
from .transforms import AugmentationConfig as AugmentationConfig
from .transforms import TrainingImages as TrainingImages
from .transforms import train_transform as train_transform

__all__ = [
    "AugmentationConfig",
    "DataError",
    "FolderImages",
    "ImageSplit",
    "Joined",
    "ParquetImages",
    "Source",
    "Subset",
    "TrainingImages",
    "open_source",
    "train_transform",
]
