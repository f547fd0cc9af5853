"""PEP 517 backend: setuptools, compiling against the torch that the target environment already has.

pip builds in an isolated environment that hides the target's packages. Asking for torch there would download a second
one (gigabytes, and perhaps another version than the one the extension will run on). The target environment is still
`sys.prefix`, so its torch can be found by its folder: that folder is all the builder needs, torch is never imported.
"""

import os
import sys
import sysconfig

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the other PEP 517 hooks are setuptools' own)


def _show_target_torch():
    site = sysconfig.get_path("purelib", vars={"base": sys.prefix, "platbase": sys.prefix})
    torch = os.path.join(site, "torch")
    if "DNL_TORCH_DIR" not in os.environ and os.path.isdir(torch):
        os.environ["DNL_TORCH_DIR"] = torch


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _show_target_torch()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _show_target_torch()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
