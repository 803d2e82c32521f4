"""The agent: one daemon per host that serves the libvirt hook and watches the keys that are in use.

- :mod:`virt_sse.agent_client`: the hook's way to it; standard library only
- :mod:`virt_sse.agent.agent`: the daemon as a whole
- :mod:`virt_sse.agent.server`, :mod:`virt_sse.agent.listener`: HTTP on a Unix socket
- :mod:`virt_sse.agent.inventory`: which domains run with which of our disks
- :mod:`virt_sse.agent.key_watch`: what has become of their keys
- :mod:`virt_sse.agent.revocation`: what becomes of domains whose key was taken away
- :mod:`virt_sse.agent.automatic_rotation`: disks that follow their key by themselves
- :mod:`virt_sse.agent.metrics`, :mod:`virt_sse.agent.logs`: what it tells
"""
