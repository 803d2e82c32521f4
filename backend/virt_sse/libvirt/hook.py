"""Former location of :mod:`virt_sse.hook`, still run by hook scripts of earlier versions."""

import runpy

runpy.run_module("virt_sse.hook", run_name="__main__", alter_sys=True)
