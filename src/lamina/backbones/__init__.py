"""Pre-trained transformers by role: which linear layers are q, k, v, out, fc1 and fc2, whatever a family names them.

`load` builds a `Backbone` from safetensors weights; `from_module` makes one of any model. `docs/backbones.md` lists the
supported families.
"""

from lamina.backbones.files import content_hash, copy_files, licence, tensors_hash
from lamina.backbones.loading import from_module, load
from lamina.backbones.roles import ROLES, Backbone, ImageInput, Kind, LanguageHead, Site, class_token, make_site
from lamina.backbones.settings import is_language

__all__ = [
    "ROLES",
    "Backbone",
    "ImageInput",
    "Kind",
    "LanguageHead",
    "Site",
    "class_token",
    "content_hash",
    "copy_files",
    "from_module",
    "is_language",
    "licence",
    "load",
    "make_site",
    "tensors_hash",
]
