# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""An image of the controller as a data URL."""

from __future__ import annotations

DOCUMENTATION = r"""
name: data_url
short_description: Return images of the controller as data URLs
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Reads images on the controller and returns each as the C(data:) URL that an OpenAI-compatible server takes in a
    question. An empty path gives an empty text.
options:
  _terms:
    description: Paths of the images.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Show how an image travels in a question
  ansible.builtin.debug:
    msg: "{{ lookup('selfhost.lmdeploy.data_url', 'sign.png') }}"
"""

RETURN = r"""
_raw:
  description: The data URLs.
  type: list
  elements: str
"""

import base64
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase

# What an image begins with, and its kind.
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def data_url(path: Path) -> str:
    """Return an image as a data URL; raise ValueError for a file that is none."""
    content = path.read_bytes()
    kind = next((kind for head, kind in KINDS.items() if content.startswith(head)), None)
    if kind is None:
        message = f"{path} is no PNG, JPEG, GIF or WebP image"
        raise ValueError(message)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


class LookupModule(LookupBase):  # type: ignore[misc] # ansible-core carries no types
    """Ansible's way in."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **_: Any) -> list[str]:
        """Return the data URLs (see DOCUMENTATION)."""
        try:
            paths = [self.find_file_in_search_path(variables, "files", term) if term else "" for term in terms]
            return [data_url(Path(path)) if path else "" for path in paths]
        except (OSError, ValueError) as error:
            raise AnsibleError(f"The image can't be used: {error}") from error
