"""Natural transformations (NaTra): images of the same class that a generator makes by moving along their codes.

Wang, Lyu, Nepal, Rudolph, Grobler and Moore, "Robust Training Using Natural Transformation", 2021, arXiv:2105.04070.

The paper's abstract names three parts: batch inversion into the latent space of a well-trained generator (BIES),
feature maps that extend the codes (LCE), and attribute directions that are found without labels and do not decide the
class (UADM); the manipulated images augment the training. Every formula, constant and schedule here is netwright's
reading. Under Lightning: :class:`netwright.train.callbacks.NaTraTraining`.
"""

from netwright.train.natra.codes import LatentCodes
from netwright.train.natra.directions import Directions, NoDirectionError, filter_directions, latent_directions
from netwright.train.natra.distortions import common_corruptions, distortion_report
from netwright.train.natra.fitting import fit_encoder, fit_style_autoencoder
from netwright.train.natra.generator import (
    DecoderGenerator,
    Generator,
    ImageEncoder,
    StyleAutoEncoder,
    StyleGenerator,
)
from netwright.train.natra.groundwork import Groundwork, lay_groundwork
from netwright.train.natra.inversion import BatchInverter, ClassifierFeatures
from netwright.train.natra.preparing import Prepared, prepare_natural_transform, prepared_from
from netwright.train.natra.recipe import Recipe
from netwright.train.natra.reference import reference_classifier
from netwright.train.natra.search import pgd_transform, random_transform, worst_of_k
from netwright.train.natra.sharpening import sharpen_style_autoencoder
from netwright.train.natra.transform import NaturalTransform, TransformGrid

__all__ = [
    "BatchInverter",
    "ClassifierFeatures",
    "DecoderGenerator",
    "Directions",
    "Generator",
    "Groundwork",
    "ImageEncoder",
    "LatentCodes",
    "NaturalTransform",
    "NoDirectionError",
    "Prepared",
    "Recipe",
    "StyleAutoEncoder",
    "StyleGenerator",
    "TransformGrid",
    "common_corruptions",
    "distortion_report",
    "filter_directions",
    "fit_encoder",
    "fit_style_autoencoder",
    "latent_directions",
    "lay_groundwork",
    "pgd_transform",
    "prepare_natural_transform",
    "prepared_from",
    "random_transform",
    "reference_classifier",
    "sharpen_style_autoencoder",
    "worst_of_k",
]
