"""Pre-trained transformers by role: which linear layers are q, k, v and so on, whatever a family names them.

`load` builds a `Backbone` from safetensors weights; `from_module` makes one of any model. `docs/backbones.md` lists the
supported families.
"""

from lamina.backbones.files import content_hash, copy_files, licence, tensors_hash
from lamina.backbones.language import LanguageHead, positions_of
from lamina.backbones.layouts import StoredLayer
from lamina.backbones.loading import from_module, load
from lamina.backbones.roles import LANGUAGE_ROLES, ROLES, Backbone, ImageInput, Kind, Site, class_token, make_site
from lamina.backbones.settings import is_language

__all__ = [
    "LANGUAGE_ROLES",
    "ROLES",
    "Backbone",
    "ImageInput",
    "Kind",
    "LanguageHead",
    "Site",
    "StoredLayer",
    "class_token",
    "content_hash",
    "copy_files",
    "from_module",
    "is_language",
    "licence",
    "load",
    "make_site",
    "positions_of",
    "tensors_hash",
]
