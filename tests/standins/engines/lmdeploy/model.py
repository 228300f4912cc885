"""The chat templates that the stand-in for LMDeploy knows."""

from typing import ClassVar


class MODELS:
    """As mmengine's registry."""

    module_dict: ClassVar = {"base": object, "vicuna": object, "hf": object}
