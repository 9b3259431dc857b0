"""Datasets as tensors: the dataset itself, readers of files, catalogue, cache, downloads."""

from offrl.data.arrays import from_arrays
from offrl.data.checks import ReadOptions
from offrl.data.dataset import DatasetInfo, OfflineDataset, concatenate
from offrl.data.frames import from_episodes, from_frame

__all__ = ["DatasetInfo", "OfflineDataset", "ReadOptions", "concatenate", "from_arrays", "from_episodes", "from_frame"]
