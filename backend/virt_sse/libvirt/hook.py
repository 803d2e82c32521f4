"""The hook under the name that scripts installed by earlier versions run; see :mod:`virt_sse.hook`."""

import runpy

runpy.run_module("virt_sse.hook", run_name="__main__", alter_sys=True)
