"""Capturing per-example, per-step gradients of looped models: sketched (:func:`attach`) or exact."""

from stepinfluence.capture.exact import ExactCapture
from stepinfluence.capture.session import LossFn
from stepinfluence.capture.sketched import Capture, attach
from stepinfluence.capture.training import TrainingInfluence

__all__ = ["Capture", "ExactCapture", "LossFn", "TrainingInfluence", "attach"]
