"""The names of reasoning parsers that the stand-in for LMDeploy knows."""

from typing import ClassVar

LEGACY_REASONING_PARSER_NAMES = ("deepseek-r1",)


class ReasoningParserManager:
    """As mmengine's registry."""

    module_dict: ClassVar = {"default": object}
