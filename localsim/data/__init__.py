"""Images to learn from: data sets, their random views, and loaders."""

from localsim.data.augment import AUGMENTATIONS as AUGMENTATIONS
from localsim.data.augment import Augmentation as Augmentation
from localsim.data.augment import augment_batch as augment_batch
from localsim.data.augment import crop_image as crop_image
from localsim.data.augment import recolour_ as recolour_
from localsim.data.classes import count_classes as count_classes
from localsim.data.datasets import Data as Data
from localsim.data.datasets import ImageSet as ImageSet
from localsim.data.datasets import class_balanced as class_balanced
from localsim.data.datasets import load_data as load_data
from localsim.data.loader import Batch as Batch
from localsim.data.loader import ViewLoader as ViewLoader
from localsim.data.loader import plain_batches as plain_batches
