"""What the build adds to the metadata: the addresses of the project, and a README whose links work on an index page.

The address of the repository is set in `pyproject.toml`, once: `[tool.hatch.metadata.hooks.custom]`.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class AddressHook(MetadataHookInterface):
    """Fills `urls` and `readme`, which `[project]` lists as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        address = self.config["address"]
        metadata["urls"] = {
            "Homepage": address,
            "Documentation": f"{address}/tree/main/docs",
            "Source": address,
            "Issues": f"{address}/issues",
            "Changelog": f"{address}/blob/main/CHANGELOG.md",
        }
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_full_addresses(text, address)}


def with_full_addresses(text: str, address: str) -> str:
    """The text with links and images that do not depend on where it is shown; code stays as it is."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _linked(part, address) for part in parts)


def _linked(text: str, address: str) -> str:
    relative = r"(?!https?://|mailto:|#)"
    text = re.sub(rf"(!\[[^\]]*\]\(){relative}", rf"\1{address}/raw/main/", text)
    return re.sub(rf"(\]\(){relative}", rf"\1{address}/blob/main/", text)
