"""The model card: README.md in the directory of a model, in the Hub's metadata format, written again after every change."""

from lamina.files import replace_text
from lamina.model.store import README, Store


def write(store: Store) -> None:
    """Write the card anew."""
    replace_text(store.path / README, "# model\n")
