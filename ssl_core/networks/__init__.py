"""Networks: backbones, heads, and how they are kept."""

from ssl_core import late_compiler

late_compiler.postpone()  # before anything here imports torchvision
