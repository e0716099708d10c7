"""The learner: a frozen backbone, its adapters and the head."""

from lamina.learner.head import Head, Output, class_scores
from lamina.learner.learner import Learner
from lamina.learner.moments import Watcher
from lamina.learner.sites import AdapterSite

__all__ = ["AdapterSite", "Head", "Learner", "Output", "Watcher", "class_scores"]
