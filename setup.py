"""The C library of the package. All else is in ``pyproject.toml``."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "virt_sse.system.libvirt_sse_xts",
            sources=["backend/libvirt_sse_xts/xts.c"],
            depends=[f"backend/libvirt_sse_xts/{name}" for name in ("aes.h", "kernel.h", "nettle_8.map")],
            extra_compile_args=["-std=gnu11", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=[
                "-Wl,-z,relro,-z,now",
                "-Wl,--version-script=backend/libvirt_sse_xts/nettle_8.map",
            ],
            optional=True,
        )
    ]
)
