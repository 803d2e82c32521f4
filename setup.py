"""The C library of the package. All else is in ``pyproject.toml``."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "virt_sse.system.libvirt_sse_xts",
            sources=["backend/libvirt_sse_xts/xts.c"],
            depends=["backend/libvirt_sse_xts/aes.h", "backend/libvirt_sse_xts/kernel.h"],
            extra_compile_args=["-std=gnu11", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=["-Wl,-z,relro,-z,now"],
            optional=True,
        )
    ]
)
