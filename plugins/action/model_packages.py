# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Runs the module model_packages on the host, and tells how far it is when it takes long."""

from __future__ import annotations

from ansible_collections.selfhost.lmdeploy.plugins.plugin_utils.watched import WatchedAction as ActionModule

__all__ = ["ActionModule"]
