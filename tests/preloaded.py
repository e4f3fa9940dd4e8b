"""Imported once by the server from which the processes of a test are forked, which saves seconds per process."""

from ssl_core import late_compiler

late_compiler.postpone()  # as the command line does, before the stages import torchvision

import ssl_core.stages.pretrain  # noqa: E402, F401
