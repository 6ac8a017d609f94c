"""Guidance: the outputs of one model under several conditions, combined into one.

Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) and related methods, for generators and flow decoders.
"""

from vistok.guidance.combinations import APG, PLAIN, ChannelNorm, Combination, Weights, weighted_sum
from vistok.guidance.options import GuidanceOptions
from vistok.guidance.rows import OFF, Guidance, Scale, classifier_free
from vistok.guidance.schedules import Schedule, ScheduleName, at_time, constant, linear, named, within

__all__ = [
    "APG",
    "OFF",
    "PLAIN",
    "ChannelNorm",
    "Combination",
    "Guidance",
    "GuidanceOptions",
    "Scale",
    "Schedule",
    "ScheduleName",
    "Weights",
    "at_time",
    "classifier_free",
    "constant",
    "linear",
    "named",
    "weighted_sum",
    "within",
]
