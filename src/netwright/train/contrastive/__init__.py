"""Contrastive learning: embeddings of one image's views are drawn together, without any labels."""

from netwright.train.contrastive.losses import alignment, info_nce, negative_cosine, nt_xent, supcon, uniformity

__all__ = ["alignment", "info_nce", "negative_cosine", "nt_xent", "supcon", "uniformity"]
