"""From a data set to batches on the device.

The data sets that configs name as `trainkit.data.NAME` are exported here.
"""

from trainkit.core.pytree import Samples
from trainkit.data.boxes import boxes
from trainkit.data.collate import Pad, lists
from trainkit.data.datasets import arrays, digits, line, synthetic
from trainkit.data.huggingface_sets import huggingface
from trainkit.data.image_folder import image_folder
from trainkit.data.shapes import shapes
from trainkit.data.tables import table
from trainkit.data.text import text

__all__ = [
    "Pad",
    "Samples",
    "arrays",
    "boxes",
    "digits",
    "huggingface",
    "image_folder",
    "line",
    "lists",
    "shapes",
    "synthetic",
    "table",
    "text",
]
