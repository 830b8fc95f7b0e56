"""Debiasing: classifiers that do not go by the colour, texture or background that nearly always comes with a class.

CDvG (Jung et al., ICML 2023, arXiv:2112.01021) needs neither labels of the bias nor examples without it: an image
translator with the classes as domains changes what is easy to change, the bias, and a classifier learns to answer alike
for such views. :class:`BiasTranslator` is its first stage, :class:`CDvG` its second. LfF (arXiv:2007.02561) learns from
the few examples that go against the bias. :func:`bias_metrics` tells how biased a classifier is.
"""

from netwright.data.biased import colored_mnist, corrupted_images
from netwright.train.debias.debiasing import CDvG
from netwright.train.debias.failure import BiasedClassifier, LfF, generalized_cross_entropy, relative_difficulty
from netwright.train.debias.measures import bias_metrics, translation_rates
from netwright.train.debias.networks import StarGANDiscriminator, StarGANGenerator
from netwright.train.debias.quality import TranslationQuality, translation_quality
from netwright.train.debias.translator import BiasTranslator, gradient_penalty
from netwright.train.debias.views import TwoViews, ViewCache, panel, signed_range

__all__ = [
    "BiasTranslator",
    "BiasedClassifier",
    "CDvG",
    "LfF",
    "StarGANDiscriminator",
    "StarGANGenerator",
    "TranslationQuality",
    "TwoViews",
    "ViewCache",
    "bias_metrics",
    "colored_mnist",
    "corrupted_images",
    "generalized_cross_entropy",
    "gradient_penalty",
    "panel",
    "relative_difficulty",
    "signed_range",
    "translation_quality",
    "translation_rates",
]
