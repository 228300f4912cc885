"""Parsers of tool calls."""

from typing import ClassVar


class ToolParserManager:
    """As mmengine's registry."""

    module_dict: ClassVar = {"qwen2d5": object, "llama3": object}
