"""Serving: predictions over HTTP while the model goes on learning. A newer version is picked up without a failed request."""

from lamina.serve.api import create_app
from lamina.serve.limits import ONLY_CLASSIFIERS, ONLY_LANGUAGE, Limits, Refusal, flag
from lamina.serve.process import allowed_hosts, bind, check_limits, read_token, run, url_of

__all__ = [
    "ONLY_CLASSIFIERS",
    "ONLY_LANGUAGE",
    "Limits",
    "Refusal",
    "allowed_hosts",
    "bind",
    "check_limits",
    "create_app",
    "flag",
    "read_token",
    "run",
    "url_of",
]
