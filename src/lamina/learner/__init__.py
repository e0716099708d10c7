"""The learner: a frozen backbone, its adapters and the head."""

from lamina.learner.head import Head, Output, class_scores, local_labels
from lamina.learner.learner import Learner, drawn
from lamina.learner.moments import Watcher
from lamina.learner.sites import AdapterSite

__all__ = ["AdapterSite", "Head", "Learner", "Output", "Watcher", "class_scores", "drawn", "local_labels"]
