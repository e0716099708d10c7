"""The fingerprint of a configuration: equal for runs with the same result."""

import hashlib
import json

from lamina.config.schema import DataConfig, MethodConfig, RunConfig

_WITHOUT_EFFECT = {"checkpoint_seconds", "jobs", "tracking"}
_ELSEWHERE = (("data", "cache"), ("data", "source"), ("backbone", "name"), ("backbone", "shard"),
              ("evaluation", "batch_size"))  # fmt: skip
"""Streams and backbones have fingerprints of their own content. The batch size of evaluation may change last bits only."""


def fingerprint(config: RunConfig, method_settings: type[MethodConfig]) -> str:
    """Returns a hash of every setting that decides the result and is not at its default.

    A setting that a later lamina adds therefore changes no fingerprint. method_settings: the settings of its method.
    """
    own = {key: value for key, value in config.method.items() if key != "name"}
    record = config.model_dump(mode="json", exclude_defaults=True, exclude=_WITHOUT_EFFECT | {"method"})
    record["method"] = method_settings(**own).model_dump(mode="json", exclude_defaults=True)
    record["method"]["name"] = config.method["name"]
    for section, key in _ELSEWHERE:
        record.get(section, {}).pop(key, None)
    if record.get("data", {}).get("max_length") == DataConfig().text_length:
        # What records of encoders say that were written while it was the default. Instructions have it in the stream's own.
        record["data"].pop("max_length")
    record = {key: value for key, value in record.items() if value != {}}
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
